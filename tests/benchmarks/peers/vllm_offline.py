"""vLLM's `LLM(...)` as a child of `offline.py`, in vLLM's environment. Its best settings are environment variables: see
`vllm_settings.py`. Usage: vllm_offline.py MODEL OPTIONS, the options as JSON."""

from __future__ import annotations

import json
import sys

from child import answer, private_stdout


def main() -> None:
    stdout = private_stdout()
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))

    def generate(prompts: list[list[int]], output_lens: list[int]) -> int:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in output_lens]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    answer(stdout, generate)


if __name__ == "__main__":
    main()
