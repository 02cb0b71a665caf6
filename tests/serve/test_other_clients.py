"""Clients that are not the openai package of Python, against a live server: litellm, openai of npm, guidellm.

`make test-harness` brings them; without them these tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from tests.serve.conftest import Folders, Served, serving, sound
from tests.serve.test_clients import CONVERSATIONS, SCHEMA, of, user

# litellm itself refuses parts that are not OpenAI's.
OPENAIS = {kind: case for kind, case in CONVERSATIONS.items() if kind != "a plugin's own part"}
NODE_MODULES = Path(sys.prefix) / "node_modules"
DRAWN: dict[str, Any] = {"temperature": 1.5, "seed": 7, "top_p": 0.9}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("others") / "log"
    with serving(folders, log, ["--deterministic-batch", "--max-new-tokens", "20"]) as served:
        yield served


@pytest.fixture(scope="module")
def answers(offline: LoadedModel) -> dict[str, str]:
    """What the model gives offline for each conversation."""
    config = GenerationConfig(max_new_tokens=9, **DRAWN)
    return {kind: offline.generate(user(same), config) for kind, (_, same, _) in CONVERSATIONS.items()}


def transcribed(offline: LoadedModel) -> str:
    asked = [{"type": "audio", "bytes": sound()}, {"type": "text", "text": "Transcribe the audio clip into text."}]
    return offline.generate(user(asked), GenerationConfig(max_new_tokens=20))


class TestLitellm:
    @pytest.fixture
    def asking(self, server: Served) -> tuple[Any, dict[str, Any]]:
        """The package, and what each of its calls is given."""
        litellm = pytest.importorskip("litellm", reason="needs litellm: make test-harness")
        return litellm, {"model": "openai/tiny", "api_base": f"{server.address}/v1", "api_key": "none"}

    def test_answers_are_those_that_the_model_gives_offline(
        self, asking: tuple[Any, dict[str, Any]], answers: dict[str, str]
    ) -> None:
        """Whole, streamed, and all at a time."""
        litellm, given = asking
        given = {**given, "max_tokens": 9, **DRAWN}
        for kind, (content, _, _) in OPENAIS.items():
            whole = litellm.completion(messages=user(content), **given)
            assert whole.choices[0].message.content == answers[kind]
            options = {"include_usage": True}
            chunks = list(litellm.completion(messages=user(content), stream=True, stream_options=options, **given))
            assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == answers[kind]
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

        async def ask_all() -> list[Any]:
            asked = (litellm.acompletion(messages=user(content), **given) for content, _, _ in OPENAIS.values())
            return await asyncio.gather(*asked)

        found = [each.choices[0].message.content for each in asyncio.run(ask_all())]
        assert found == [answers[kind] for kind in OPENAIS]

    def test_other_paths_answer_too(self, asking: tuple[Any, dict[str, Any]], offline: LoadedModel) -> None:
        litellm, given = asking
        formed = litellm.completion(messages=user("a"), max_tokens=120, response_format=FORM, **given)
        assert set(json.loads(formed.choices[0].message.content)) == set(SCHEMA["required"])
        told = litellm.completion(messages=user("a"), max_tokens=3, n=2, logprobs=True, top_logprobs=2, **given)
        assert len(told.choices) == 2 and len(told.choices[0].logprobs.content[0].top_logprobs) == 2
        text = litellm.text_completion(
            prompt="to be", max_tokens=4, **{**given, "model": "text-completion-openai/tiny"}
        )
        assert text.choices[0].text
        said = litellm.transcription(file=("a.wav", sound()), **given)
        assert said.text == transcribed(offline)
        with pytest.raises(litellm.BadRequestError, match="frequency_penalty"):
            litellm.completion(messages=user("a"), frequency_penalty=0.5, **given)


SCRIPT = """
const OpenAI = require("openai");
const {address, conversations, drawn, form, wav} = JSON.parse(require("fs").readFileSync(0));
const client = new OpenAI({baseURL: address + "/v1", apiKey: "none", maxRetries: 0});
const user = (content) => [{role: "user", content}];
async function main() {
  const whole = {}, streamed = {}, usage = {};
  for (const [kind, content] of Object.entries(conversations)) {
    const asked = {model: "tiny", messages: user(content), max_tokens: 9, ...drawn};
    whole[kind] = await client.chat.completions.create(asked);
    const stream = await client.chat.completions.create(
      {...asked, stream: true, stream_options: {include_usage: true}});
    streamed[kind] = "";
    for await (const chunk of stream) {
      streamed[kind] += chunk.choices[0]?.delta?.content ?? "";
      if (chunk.usage) usage[kind] = chunk.usage.total_tokens;
    }
  }
  const formed = await client.chat.completions.create(
    {model: "tiny", messages: user("a"), max_tokens: 120, response_format: form});
  const several = await client.chat.completions.create(
    {model: "tiny", messages: user("a"), max_tokens: 3, n: 2, logprobs: true, top_logprobs: 2});
  const text = await client.completions.create({model: "tiny", prompt: "to be", max_tokens: 4});
  const said = await client.audio.transcriptions.create(
    {model: "tiny", file: await OpenAI.toFile(Buffer.from(wav, "base64"), "a.wav")});
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  let refused;
  try {
    await client.chat.completions.create({model: "tiny", messages: user("a"), frequency_penalty: 0.5});
  } catch (error) { refused = {status: error.status, message: error.message, param: error.param}; }
  // A stream that is left in its middle.
  const left = await client.chat.completions.create(
    {model: "tiny", messages: user("a"), max_tokens: 200, ignore_eos: true, stream: true});
  for await (const chunk of left) break;
  console.log(JSON.stringify({whole, streamed, usage, formed, several, text, said, names, refused}));
}
main();
"""


def test_openai_of_npm(server: Served, answers: dict[str, str], offline: LoadedModel) -> None:
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "openai").is_dir():
        pytest.skip(f"needs node, and openai of npm in {NODE_MODULES}: make test-harness")
    asked = {
        "address": server.address,
        "conversations": {kind: content for kind, (content, _, _) in CONVERSATIONS.items()},
        "drawn": DRAWN,
        "form": FORM,
        "wav": of(sound()),
    }
    ran = subprocess.run(
        [node, "-e", SCRIPT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "NODE_PATH": str(NODE_MODULES)},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["streamed"] == answers
    for kind, (_, _, adapters) in CONVERSATIONS.items():
        whole = found["whole"][kind]
        assert whole["choices"][0]["message"]["content"] == answers[kind]
        assert whole["molora"]["adapters"] == adapters and found["usage"][kind] == whole["usage"]["total_tokens"]
    assert set(json.loads(found["formed"]["choices"][0]["message"]["content"])) == set(SCHEMA["required"])
    assert len(found["several"]["choices"]) == 2
    assert len(found["several"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert found["text"]["choices"][0]["text"] and found["said"]["text"] == transcribed(offline)
    assert found["names"][:2] == ["tiny", "tiny:audio"]
    assert found["refused"]["status"] == 400 and "frequency_penalty" in found["refused"]["message"]


def test_guidellm_measures_without_a_failed_request(server: Served, folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("guidellm", reason="needs guidellm: make test-harness")
    rows = ({"prompt": f"what is {index}?", "output_tokens_count": 8} for index in range(40))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {
        "backend": f"kind=openai_http,target={server.address},model=tiny",
        "profile": "kind=concurrent,streams=4",
        "constraint": "kind=max_requests,count=20",
        "data": f"kind=json_file,path={tmp_path / 'rows.jsonl'}",
        "tokenizer": f"kind=hf_auto,model={folders.backbone}",
        "output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    options = [word for name, value in told.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "guidellm", "run", "--disable-console", *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (measured,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert len(measured["requests"]["successful"]) == 20
    assert not measured["requests"]["errored"] and not measured["requests"]["incomplete"]
    assert all(each["output_metrics"]["text_tokens"] == 8 for each in measured["requests"]["successful"])
