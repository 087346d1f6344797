"""A server with the API of OpenAI on loopback, in this process: a real tiny model behind it, and faults on demand."""

import contextlib
import json
import threading
import time
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from glm4v import Glm4v, Processor
from glm4v.prompt import Conversation, render
from rlcs.prompts import make
from rlcs.rollout import RolloutSettings, rollouts

STYLES = {"vllm": "vllm", "older vllm": "vllm", "sglang": "sglang", "transformers": "transformers", "bytes": "openai",
          "text": "openai"}  # fmt: skip


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("rlcs.engines.http.pause", lambda tries: 0.01)
    monkeypatch.setattr("rlcs.endpoint.pause", lambda tries: 0.01)
    monkeypatch.setattr("rlcs.engines.fleet.REST_S", 0.02)
    monkeypatch.setattr("rlcs.engines.fleet.GRACE_S", 0.1)


class FakeServer:
    """``style`` says whose ways it has: vllm, older vllm, sglang, transformers, bytes (of each token), or text alone.

    ``fault(number, path, body)`` may return a status to answer with, "drop" (the line is cut), "cut" (half a reply),
    "late" (a reply after `delay`) or bytes to send instead; None answers well.
    """

    def __init__(self, checkpoint, style="vllm", fault=None, delay=0.0, label="default", port=0):
        self.model, self.processor = Glm4v.from_pretrained(checkpoint), Processor.from_pretrained(checkpoint)
        added = self.processor.tokenizer.get_added_tokens_decoder()
        stops = set(self.model.generation_config["eos_token_id"])
        controls = {id for id, token in added.items() if token.special} - stops
        # What a trained model would not say: control tokens, bytes that are no text, ids that pad the vocabulary.
        every = range(self.model.config.text_config.vocab_size)
        broken = {id for id in every if not self.bytes_of(id) or not self.bytes_of(id).isascii()}
        self.banned = torch.tensor(sorted(controls | broken))
        self.checkpoint, self.style, self.fault, self.delay, self.label = checkpoint, style, fault, delay, label
        self.requests, self.answered, self.busy, self.most_busy = [], [], 0, 0
        self.errors = []  # of this file
        self.resumed = threading.Event()
        self.resumed.set()
        self.models = {}  # of transformers: by folder
        self.lock, self.generates = threading.Lock(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.respond(None)

            def do_POST(self):
                self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def respond(self, body):
                with outer.lock:
                    outer.requests.append((self.path, self.headers.get("Authorization"), body))
                    number = len(outer.requests)
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                try:
                    found = outer.fault(number, self.path, body) if outer.fault else None
                    if found == "late":
                        time.sleep(outer.delay)
                    well = found in (None, "late", "cut")
                    status, reply = outer.reply(self.path, body) if well else (200, found)
                finally:
                    with outer.lock:  # before the reply is out: its reader may ask again at once
                        outer.busy -= 1
                if found == "drop":
                    return self.connection.close()
                if isinstance(found, int):
                    return self.send(found, b'{"error": "on demand"}')
                if isinstance(found, bytes):
                    return self.send(200, found)
                data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send(status, data, whole=found != "cut")

            def send(self, status, data, whole=True):
                self.send_response(status)
                self.send_header("Content-Type", "text/event-stream" if data[:5] == b"data:" else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if whole else data[: len(data) // 2])
                if not whole:
                    self.connection.close()

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(OSError):  # the line was cut, on demand
                    super().handle()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128  # as many connections may come at once

            def handle_error(self, *_):
                outer.errors.append(traceback.format_exc())

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def chats(self):
        return [body for path, _, body in self.requests if path.endswith("/chat/completions")]

    def paths(self):
        return [path for path, _, _ in self.requests if not path.endswith("/chat/completions")]

    # --- what it says ---

    def reply(self, path, body):
        if path.endswith("/chat/completions"):
            assert self.resumed.wait(20), "paused for good"
            return self.chat(body)
        if path.startswith("/pause"):
            self.resumed.clear()
        if path == "/resume":
            self.resumed.set()
        if path in ("/weight_info", "/model_info"):
            return 200, {"weight_version": self.label}
        if path == "/update_weights":
            self.take_in(body["update_info"]["path"])
        if path == "/finish_weight_update":
            self.label = body["weight_version"]
        if path == "/update_weights_from_disk":
            self.take_in(body["model_path"])
            self.label = body["weight_version"]
            return 200, {"success": True, "message": "", "num_paused_requests": 0}
        if path == "/load_model":
            self.models[body["model"]] = Glm4v.from_pretrained(body["model"])
            return 200, f'data: {{"status": "loading"}}\n\ndata: {{"status": "ready", "model": "{body["model"]}"}}\n\n'
        if path == "/mine":
            self.take_in(body["path"])
            self.label = body["version"]
        return 200, {}

    def take_in(self, folder):
        new = Glm4v.from_pretrained(folder).state_dict()
        with torch.no_grad(), self.generates:
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(new[name])

    def chat(self, body):
        messages, codec = body["messages"], self.processor.codec
        prefix = ""
        if messages[-1]["role"] == "assistant":
            assert body["continue_final_message"] and not body.get("add_generation_prompt")
            messages, prefix = messages[:-1], messages[-1]["content"]
        model, settings = self.model, body
        if self.style == "transformers":
            model = self.models[body["model"]]
            names = {id: text for text, id in codec.specials.items()}
            pieces = render(self.processor.template, Conversation(messages), codec)
            rendered = "".join(p if isinstance(p, str) else names[p] for p in pieces)
            written = body["chat_template_kwargs"]["prompt_as_written"]
            assert written.startswith(rendered)
            prefix = written[len(rendered) :]
            settings = json.loads(body["generation_config"])
            assert settings["do_sample"] and settings["top_k"] == 0
        prompt = make(messages, self.processor)
        said = codec.encode(prefix)
        if said:
            ids = torch.tensor(said)
            positions = (prompt.next_position + torch.arange(len(said))).expand(3, -1)
            prompt = replace(
                prompt,
                input_ids=torch.cat([prompt.input_ids, ids]),
                position_ids=torch.cat([prompt.position_ids, positions], 1),
                next_position=prompt.next_position + len(said),
            )
        how = RolloutSettings(body["max_tokens"], temperature=settings["temperature"], top_p=settings["top_p"])
        with self.generates:
            run = rollouts(model, [prompt], 1, [(body["seed"],)], how)
            run._banned = self.banned
            ((_, (answer,)),) = run
            label = self.label
        ids, stopped = answer.token_ids.tolist(), answer.finish_reason == "stop"
        names = {id: codec._full.id_to_token(id) for id in ids}
        token = {
            "older vllm": lambda id: f"token_id:{id}",
            "bytes": lambda id: names[id],
        }.get(self.style, lambda id: names[id] or "")
        content = [
            {"token": token(id), "logprob": float(x), "bytes": list(self.bytes_of(id)), "top_logprobs": []}
            for id, x in zip(ids, answer.logprobs, strict=True)
        ]
        controls = {id for id, t in codec._full.get_added_tokens_decoder().items() if t.special}
        text = b"".join(self.bytes_of(id) for id in ids if id not in controls).decode("utf-8", "replace")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
        if stopped:
            choice["finish_reason"] = "stop"
        if self.style not in ("transformers", "text"):
            choice["logprobs"] = {"content": content}
        if self.style in ("vllm", "sglang"):
            choice["token_ids"] = ids
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        reply = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}
        if self.style == "sglang":
            reply["metadata"] = {"weight_version": label}
        with self.lock:
            self.answered.append((body["seed"], tuple(ids)))
        return 200, reply

    def bytes_of(self, id):
        from glm4v.detokenize import token_bytes

        return token_bytes(self.processor.tokenizer, id)


@contextlib.contextmanager
def fake(checkpoint, **options):
    server = FakeServer(checkpoint, **options)
    try:
        yield server
    finally:
        server.stop()
    assert not server.errors, server.errors[0]
