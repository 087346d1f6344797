"""The subcommands of `glm4v`. Results go to stdout; progress, thinking and rates go to stderr.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from .model import Glm4v
    from .processor import Processor

app = typer.Typer(
    help="GLM-4.1V: questions about pictures and videos, answered.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Option("--model", metavar="DIR", help="Folder of a Hugging Face checkpoint.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="The most tokens of an answer, thinking included.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, metavar="T", help="0 takes the likeliest token. Default: the checkpoint's."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="P", help="Keep the likeliest tokens that reach this probability together."),
]
TopK = Annotated[
    int | None, typer.Option(min=0, metavar="K", help="Keep this many of the likeliest tokens; 0 keeps all.")
]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="P", help="Keep tokens with this share of the likeliest one's probability."),
]
Penalty = Annotated[float | None, typer.Option(metavar="X", help="Above 1: repeat less.")]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="The same seed gives the same answer.")]
Budget = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="End the thinking after N tokens; 0 turns it off.")
]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="Type of the weights. Default: the checkpoint's.")]
Device = Annotated[str, typer.Option("--device", metavar="D", help="Where the model runs, such as cuda.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Pixels of a picture, over all frames; an image is two. Default: the checkpoint's."
    ),
]
MaxAspect = Annotated[
    float, typer.Option(min=1, metavar="X", help="How many times longer than the other a picture's side may be.")
]
Network = Annotated[bool, typer.Option("--allow-network", help="Fetch http(s) URLs.")]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from glm4v_ext import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
    else:
        import numpy  # noqa: F401 - now, as a Ctrl-C would be lost while torch's C++ imports it


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(metavar="P", help="The question; - reads it from stdin.")] = None,
    image: Annotated[list[str] | None, typer.Option(metavar="F", help="An image; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(metavar="F", help="A video; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 4096,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; may be repeated.")
    ] = None,
    thinking_budget: Budget = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    max_pixels: MaxPixels = None,
    max_aspect_ratio: MaxAspect = 200,
    allow_network: Network = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer is whole.")] = False,
) -> None:
    """Answers one question about images, videos, or nothing but text."""
    content = _content(image or [], video or [], _stdin() if prompt == "-" else prompt)
    from .chat import shown, timed, whole

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    processor = _processor(model, max_pixels, max_aspect_ratio, allow_network)
    options = _options(
        model,
        processor,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        thinking_budget=thinking_budget,
    )
    batch = processor(messages)  # before the weights: a bad file is known at once
    glm = load(model, dtype, device, processor)
    notes = Console(stderr=True)
    pieces = timed(glm.stream(batch, seed=seed, **options), notes)
    start = time.perf_counter()
    answer = whole(pieces if as_json else shown(pieces, notes))
    if as_json:
        readable = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(json.dumps(answer.to_json(), ensure_ascii=not readable))
    seconds = time.perf_counter() - start
    count = len(answer.token_ids)
    rate = f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s"
    print(f"{rate}, prompt of {answer.prompt_tokens} tokens included; {answer.finish_reason}", file=sys.stderr)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 4096,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    thinking_budget: Budget = None,
    dtype: DtypeOption = None,
    device: Device = "cpu",
    max_pixels: MaxPixels = None,
    max_aspect_ratio: MaxAspect = 200,
    allow_network: Network = False,
) -> None:
    """Talks, with files by path. /help lists what can be typed."""
    from .chat import Chat

    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are wrong with one line alone
    processor = _processor(model, max_pixels, max_aspect_ratio, allow_network)
    options = _options(
        model,
        processor,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        thinking_budget=thinking_budget,
    )
    Chat(load(model, dtype, device, processor), system, seed=seed, **options).run()


@app.command()
def info(model: Annotated[str | None, typer.Option("--model", metavar="DIR", help="A checkpoint.")] = None) -> None:
    """Sizes and memory of a checkpoint, and how the kernels were built."""
    from glm4v_ext import build_info

    build: dict[str, Any] = build_info()
    ops = build.pop("ops")
    for name, value in {**(checkpoint_facts(model) if model is not None else {}), **build, **ops}.items():
        if isinstance(value, dict):
            value = [f"{key}: {one}" for key, one in value.items()]
        print(f"{name:<30}  {', '.join(value) if isinstance(value, list) else value}")


@app.command()
def assemble(
    vision: Annotated[str, typer.Option(metavar="DIR", help="An AIMv2 encoder with a position table.")],
    language: Annotated[str, typer.Option(metavar="DIR", help="A GLM-4-0414 decoder with its tokenizer.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write: a new or empty folder.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: the decoder's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of the new merger's weights.")] = 0,
) -> None:
    """Builds a base checkpoint from an encoder and a decoder, to be trained."""
    import torch

    from .assemble import assemble as build

    config = build(vision, language, out, getattr(torch, dtype.value) if dtype else None, seed)
    tower, text = config.vision_config, config.text_config
    print(f"{out}: {tower.depth} vision and {text.num_hidden_layers} text layers, {config.dtype}")


def checkpoint_facts(folder: str) -> dict[str, str]:
    """Facts from `config.json`; the weights aren't read."""
    import torch

    from . import Config, Glm4v

    config = Config.from_pretrained(folder)
    vision, text = config.vision_config, config.text_config
    glm = Glm4v(config, device="meta")
    parameters = sum(p.numel() for p in glm.parameters())
    tower = sum(p.numel() for p in glm.visual.parameters())
    dtype = config.dtype or "float32"
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim

    def size(values: int, name: str) -> str:
        gigabytes = values * getattr(torch, name).itemsize / 1e9
        return f"{gigabytes:.1f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1e3:.1f} MB"

    return {
        "checkpoint": folder,
        "vision": f"{vision.depth} layers, width {vision.hidden_size}, {vision.num_heads} heads",
        "language": f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} query and "
        f"{text.num_key_value_heads} key heads, {text.vocab_size} tokens, context {text.max_position_embeddings}",
        "parameters": f"{parameters:,} ({tower:,} for vision)",
        "weights on disk": f"{dtype}, {size(parameters, dtype)}",
        "memory, bfloat16": f"{size(parameters, 'bfloat16')} and {size(per_token * 1000, 'bfloat16')} per 1000 tokens",
        "memory, float32": f"{size(parameters, 'float32')} and {size(per_token * 1000, 'float32')} per 1000 tokens",
    }


def load(folder: str, dtype: Dtype | None, device: str, processor: Processor) -> Glm4v:
    """The model, with a bar on stderr while its weights are read."""
    import torch

    from . import Glm4v, InputError
    from .device import device_of

    try:
        device_of(device)
    except InputError as error:
        raise typer.BadParameter(str(error).removeprefix("device "), param_hint="--device") from None
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        kind = getattr(torch, dtype.value) if dtype else None
        model = Glm4v.from_pretrained(folder, kind, device, progress)
    model.processor = processor
    return model


def _processor(folder: str, max_pixels: int | None, max_aspect_ratio: float, allow_network: bool) -> Processor:
    from . import Processor

    return Processor.from_pretrained(
        folder, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio, allow_network=allow_network
    )


def _options(folder: str, processor: Processor, **options: Any) -> dict[str, Any]:
    """``options`` of `Glm4v.stream`, once they are checked: what is wrong is known before the weights are read."""
    from .config import read_generation_config
    from .generate import Settings

    Settings.read(read_generation_config(folder, processor.config), **options)
    return options


def _stdin() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff").rstrip("\r\n")  # of a file that was made on Windows
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin must be text, got {error}", param_hint="--prompt") from None


def _content(images: list[str], videos: list[str], prompt: str | None) -> list[dict[str, str]]:
    """Files in the order given, images before videos, then the question."""
    if not (images or videos or prompt):
        raise typer.BadParameter("must be given where no --image or --video is", param_hint="--prompt")
    content: list[dict[str, str]] = [{"type": "image", "image": file} for file in images]
    content += [{"type": "video", "video": file} for file in videos]
    return content + ([{"type": "text", "text": prompt}] if prompt else [])
