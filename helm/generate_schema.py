"""Write what the chart says about `config` from `ServeConfig`: its part of values.schema.json, and the list of keys in
values.yaml. Run it after a change of the configuration: `python helm/generate_schema.py`."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from kvarto.protos.config import ServeConfig

CHART = Path(__file__).parent / "kvarto"
DECIDED_BY_THE_CHART = ("api_key", "executor", "host")
"""A key belongs in a Secret; on Kubernetes ranks are Ray's; a pod listens on all of its addresses."""

BLOCK_SIZES = [8, 16, 32, 64, 128]
PORTS = {"type": "integer", "minimum": 1024, "maximum": 65535}
"""Fixed, because Services name them, and not privileged, because the server is not root. `grpc.enabled` is for null,
which Helm takes for "as if it were not there"."""

BEGIN, END = "  # BEGIN keys", "  # END keys"


def config_schema() -> dict[str, Any]:
    """JSON schema, draft 7, of the `config` map."""
    model = ServeConfig.model_json_schema()
    properties = {key: _plain(spec) for key, spec in model["properties"].items() if key not in DECIDED_BY_THE_CHART}
    properties["block_size"] |= {"enum": BLOCK_SIZES}
    for key in ("port", "grpc_port"):
        properties[key] = {"description": properties[key]["description"], "default": properties[key]["default"]} | PORTS
    return {"type": "object", "additionalProperties": False, "required": model["required"], "properties": properties}


def schema_text() -> str:
    """values.schema.json with the present `config`."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    schema["properties"]["config"] = config_schema()
    return json.dumps(schema, indent=2) + "\n"


def values_text() -> str:
    """values.yaml with the present keys of `config`, as comments: each with its default and what it means."""
    before, rest = (CHART / "values.yaml").read_text().split(BEGIN, 1)
    first_line, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    lines = []
    for key, spec in config_schema()["properties"].items():
        if key == "model":
            continue
        lines += textwrap.wrap(spec["description"].replace("`", ""), 112, initial_indent="  # -- ",
                               subsequent_indent="  # ")
        lines.append(f"  # {key}: {json.dumps(spec['default'])}")
    return f"{before}{BEGIN}{first_line}\n" + "\n".join(lines) + f"\n{END}{after}"


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    spec = {key: value for key, value in spec.items() if key != "title"}
    if "description" in spec:
        spec["description"] = re.sub(r"\s+", " ", spec["description"])
    return spec


def main() -> None:
    (CHART / "values.schema.json").write_text(schema_text())
    (CHART / "values.yaml").write_text(values_text())


if __name__ == "__main__":
    main()
