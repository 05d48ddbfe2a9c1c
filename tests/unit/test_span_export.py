"""Spans at a collector that speaks OTLP: whole, as trees, from the engine as it serves."""

from __future__ import annotations

import gzip
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto import LLM, SamplingParams
from kvarto.protos import config as config_module
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ConfigError
from kvarto.protos.span_export import export_spans
from kvarto.protos.spans import Span, heard


class Collector:
    """Keeps (role of the process, span) of all that it is sent."""

    def __init__(self):
        self.spans = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
                    told = {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
                    assert told["service.name"] == "kvarto"
                    collector.spans += [(told["process.role"], span) for scope in sent.scope_spans
                                        for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def children(self):
        """Name -> names of the spans that were inside such a span."""
        names = {span.span_id: span.name for _, span in self.spans}
        found = defaultdict(set)
        for _, span in self.spans:
            found[names.get(span.parent_span_id)].add(span.name)
        return found


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


def test_spans_arrive_as_trees_and_none_is_lost_at_the_end(collector):
    stop = export_spans(collector.endpoint, "here")
    for _ in range(3000):
        with Span("outer"), Span("inner"):
            pass
    stop()
    assert len(collector.spans) == 6000
    assert collector.children() == {None: {"outer"}, "outer": {"inner"}}
    assert {role for role, _ in collector.spans} == {"here"}
    outer = [span for _, span in collector.spans if span.name == "outer"]
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in outer)
    assert not heard()


def test_a_process_that_is_asked_twice_tells_once(collector):
    stops = [export_spans(collector.endpoint, "here") for _ in range(2)]
    stops[0]()
    with Span("a"):
        pass
    stops[1]()
    assert len(collector.spans) == 1


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(tmp_path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_an_engine_tells_of_every_step(collector, model):
    with LLM(model, num_blocks=20, dtype="float32", otlp_traces_endpoint=collector.endpoint) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True), use_tqdm=False)
    children = collector.children()
    assert children["forward"] == {"take_rows", "norm", "rotation", "activation", "linear", "cache_write", "attention",
                                   "best_tokens"}
    assert children[None] >= {"schedule", "take result", "build batch", "forward", "sample", "detokenize"}
    assert sum(span.name == "forward" for _, span in collector.spans) == 9


@pytest.mark.slow
def test_ranks_and_head_on_ray_tell_too(collector, model):
    with LLM(model, num_blocks=20, dtype="float32", tensor_parallel_size=2, threads_per_rank=1,
             otlp_traces_endpoint=collector.endpoint) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True), use_tqdm=False)
        roles = {"rank 0": "forward", "rank 1": "forward", "head": "schedule"}
        for _ in range(200):
            if all(any(role == who and span.name == name for who, span in collector.spans)
                   for role, name in roles.items()):
                break
            threading.Event().wait(0.1)
    told = {(role, span.name) for role, span in collector.spans}
    assert told >= {*roles.items(), ("frontend", "detokenize")}


def test_a_wrong_endpoint_is_refused():
    with pytest.raises(ConfigError, match="otlp_traces_endpoint: must be an HTTP URL"):
        EngineConfig.parse({"model": "m", "otlp_traces_endpoint": "collector:4317"})


def test_a_missing_exporter_is_told_of_at_once(monkeypatch):
    monkeypatch.setattr(config_module, "EXPORTER", "no.such.exporter")
    with pytest.raises(ConfigError, match=r"pip install 'kvarto\[tracing\]'"):
        EngineConfig.parse({"model": "m", "otlp_traces_endpoint": "http://collector:4318/v1/traces"})
