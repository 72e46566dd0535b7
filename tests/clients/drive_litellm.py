"""LiteLLM against a worker on the embedded model, both over their real sockets; run by `make test-litellm`.

LiteLLM asks for an older openai than the suite tests, so it has an environment of its own and this is no pytest.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network what models cost
import litellm

WORKER = Path(__file__).parents[2] / ".venv" / "bin" / "worker-orcd"
HAIKU = [{"role": "user", "content": "Write a haiku about rain"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    },
}


@contextlib.contextmanager
def worker() -> Iterator[str]:
    """The address of a worker that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(WORKER), "serve", "--device", "cpu", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def main() -> int:
    with worker() as base:
        ours = {"model": "openai/haiku", "api_base": f"{base}/v1", "api_key": "none", "seed": 1, "max_tokens": 40}
        whole = litellm.completion(messages=HAIKU, **ours)
        text = whole.choices[0].message.content
        assert text
        assert whole.usage.completion_tokens > 5
        streamed, usage = "", None
        for chunk in litellm.completion(messages=HAIKU, stream=True, stream_options={"include_usage": True}, **ours):
            streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = getattr(chunk, "usage", None) or usage
        assert streamed == text, "the same request and seed give the same text, streamed or whole"
        assert usage.completion_tokens == whole.usage.completion_tokens
        called = litellm.completion(messages=HAIKU, tools=[TOOL], tool_choice="required", **ours).choices[0]
        assert [call.function.name for call in called.message.tool_calls] == ["add"]
        scored = litellm.completion(messages=HAIKU, logprobs=True, top_logprobs=2, **ours).choices[0]
        assert all(len(item["top_logprobs"]) == 2 for item in scored.logprobs["content"])
        plain = litellm.text_completion(prompt="The sea", **ours | {"model": "text-completion-openai/haiku"})
        assert plain.choices[0].text
        other = litellm.completion(
            model="anthropic/haiku", api_base=base, api_key="none", messages=HAIKU, max_tokens=40
        )
        assert other.choices[0].message.content
        refusal = ""
        try:
            litellm.completion(messages=HAIKU, temperature=-1, **ours)
        except litellm.BadRequestError as error:
            refusal = str(error)
        assert "temperature" in refusal
    print("LiteLLM: chat whole and streamed, tools, log-probabilities, text, the Anthropic route, errors: all well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
