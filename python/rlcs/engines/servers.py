"""What servers differ in: what a request may say beyond the standard, how an answer is continued, how weights go in.

Names of fields and addresses are those of the servers' own sources and documents, as of vLLM 0.32, SGLang of autumn
2026 and transformers 5.24.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..endpoint import Fault, shown

Kind = Literal["vllm", "sglang", "transformers", "openai"]


@dataclass(frozen=True)
class Weights:
    """A checkpoint that servers can read: ``label`` tells it from every other."""

    version: int
    path: Path

    @property
    def label(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: list[dict[str, Any]]  # with pictures
    rendered: str  # the prompt as the trainer's template writes it, a placeholder for each picture
    said: str  # the answer's beginning, to go on from
    tokens: int  # at most
    temperature: float
    top_p: float
    seed: int
    stop_ids: Sequence[int]
    banned: Sequence[int]


Call = Callable[..., Any]
"""``call(path, body)``: JSON to this server and back; a GET without a body."""


class OpenAI:
    """Only what the standard has, and the usual way to continue an answer. Weights go in as the settings say."""

    name: Kind = "openai"
    tells: bool = False  # it knows how to take in weights
    path_is_model = False  # requests name their weights

    def body(self, ask: Ask) -> dict[str, Any]:
        return {"logprobs": True, **self._continued(ask)}

    def _continued(self, ask: Ask) -> dict[str, Any]:
        if not ask.said:
            return {"messages": ask.messages}
        messages = [*ask.messages, {"role": "assistant", "content": ask.said}]
        return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}

    def tell(self, call: Call, weights: Weights) -> None:
        raise Fault("nobody has said how this server takes in weights")

    def held(self, call: Call) -> str | None:
        """The label of the weights there, if it can be known."""
        return None


class Vllm(OpenAI):
    """vLLM, started with ``VLLM_SERVER_DEV_MODE=1`` and ``--weight-transfer-config '{"backend": "disk"}'``."""

    name: Kind = "vllm"
    tells = True

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            **self._continued(ask),
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **_whole_distribution(ask),
            "top_k": 0,
        }

    def tell(self, call: Call, weights: Weights) -> None:
        begun = False
        try:
            call("/pause?mode=wait", {})  # also empties the cache of what the old weights have read
            call("/init_weight_transfer_engine", {"init_info": {}})
            call("/start_weight_update", {})
            begun = True
            call("/update_weights", {"update_info": {"path": str(weights.path)}})
            call("/finish_weight_update", {"weight_version": weights.label})
        except Fault as fault:
            fault.lost |= begun  # it may have some of the new weights: nothing is asked before it has all
            with contextlib.suppress(Fault):  # a server that stays paused would keep the old ones to itself
                call("/resume", {})
            raise
        call("/resume", {})

    def held(self, call: Call) -> str | None:
        return _field(call("/weight_info"), "weight_version")


class Sglang(OpenAI):
    """SGLang."""

    name: Kind = "sglang"
    tells = True

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            **self._continued(ask),
            "logprobs": True,
            "return_token_ids": True,
            "separate_reasoning": False,
            **_whole_distribution(ask),
            "top_k": -1,
        }

    def tell(self, call: Call, weights: Weights) -> None:
        body = {"model_path": str(weights.path), "weight_version": weights.label, "flush_cache": True}
        reply = call("/update_weights_from_disk", body)
        if not (isinstance(reply, Mapping) and reply.get("success")):
            raise Fault(f"/update_weights_from_disk: expected success, got {shown(str(reply))}", passes=True)

    def held(self, call: Call) -> str | None:
        return _field(call("/model_info"), "weight_version")


class Transformers(OpenAI):
    """``transformers serve`` without a fixed model: each request names the folder of its weights.

    It gives neither ids nor log-probabilities, samples only where a generation config says so, and continues no answer;
    but a request may bring its template, and this one writes the prompt and the answer's beginning as they are. Of a
    video it wants the sound first, whatever the model: silent ones it can't read.
    """

    name: Kind = "transformers"
    tells = True
    path_is_model = True

    def body(self, ask: Ask) -> dict[str, Any]:
        how = {
            "max_new_tokens": ask.tokens,
            "do_sample": ask.temperature > 0,
            **({"temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0} if ask.temperature > 0 else {}),
            "eos_token_id": list(ask.stop_ids),
            "pad_token_id": ask.stop_ids[0],
            "suppress_tokens": list(ask.banned),
        }
        template = {"chat_template": "{{ prompt_as_written }}", "prompt_as_written": ask.rendered + ask.said}
        if any(part.get("type") == "video_url" for message in ask.messages for part in _parts(message)):
            raise Fault("`transformers serve` reads no silent video: tasks with videos need another server")
        return {"messages": ask.messages, "generation_config": json.dumps(how), "chat_template_kwargs": template}

    def tell(self, call: Call, weights: Weights) -> None:
        said = call("/load_model", {"model": str(weights.path)})  # events, a line each
        if '"ready"' not in str(said):
            raise Fault(f"/load_model: expected ready, got {shown(str(said)[-200:])}", passes=True)


SERVERS: dict[str, OpenAI] = {one.name: one for one in (OpenAI(), Vllm(), Sglang(), Transformers())}


@dataclass(frozen=True)
class Told:
    """How weights go in where the settings say so: a request or a command, {path}, {version} and {url} filled in."""

    path: str | None
    body: str
    command: str | None
    timeout_s: float  # of the command

    def tell(self, call: Call, url: str, weights: Weights) -> None:
        names = {"path": str(weights.path), "version": weights.label, "url": url}
        if self.path is not None:
            escaped = {name: json.dumps(value)[1:-1] for name, value in names.items()}
            call(_filled(self.path, names), json.loads(_filled(self.body, escaped)))
        if self.command is not None:
            words = [_filled(word, names) for word in shlex.split(self.command)]
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=self.timeout_s)
            except (OSError, subprocess.SubprocessError) as error:
                raise Fault(f"{words[0]}: {error}") from None
            if done.returncode:
                said = shown(done.stderr or done.stdout)
                raise Fault(f"{words[0]}: exit code {done.returncode}: {said}", passes=True)


def _whole_distribution(ask: Ask) -> dict[str, Any]:
    """None of a server's own defaults, which it takes from the checkpoint, stands between the model and its answer."""
    return {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(ask.stop_ids),
        "logit_bias": {str(id): -100.0 for id in ask.banned},
        "skip_special_tokens": False,
    }


def _filled(template: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        template = template.replace("{" + name + "}", value)
    return template


def _field(body: Any, name: str) -> str | None:
    value = body.get(name) if isinstance(body, Mapping) else None
    return None if value is None else str(value)


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else message["content"]
