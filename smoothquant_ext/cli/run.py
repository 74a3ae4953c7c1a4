"""The commands that run a model: generate, serve, chat."""

from __future__ import annotations

import time
from typing import Annotated, Any, cast

import typer

from ..errors import SmoothQuantError
from .console import err
from .options import Device, Drop, Dtype, Model, Seed, Served
from .prompts import check_temperature, check_text, room_for
from .support import KV_CACHES, choose, load, parse_device, parse_dtype


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue or, with --chat, to answer.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this number of tokens.", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; higher values are more random.", min=0.0)
    ] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send PROMPT as a message to an instruction-tuned model.")
    ] = False,
    kv_cache: Annotated[
        str,
        typer.Option(help="int8: cache keys and values in INT8, in about half the memory of auto."),
    ] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
    seed: Seed = 0,
) -> None:
    """Continues a prompt and prints the words as they come.

    Example: [bold]smoothquant generate smol-w8a8 "The state of our union is" --max-new-tokens 40[/bold]
    """
    import torch
    from jinja2 import TemplateError
    from transformers import TextStreamer

    from ..checkpoint.model_classes import does_not_continue
    from ..compat import first_line
    from ..inputs import tokenizer_of
    from ..traits import predicts_next_token

    wants_int8_cache = choose("kv-cache", kv_cache, KV_CACHES) == "int8"
    check_temperature(temperature)
    check_text("PROMPT", prompt)
    network, processor = load(model, parse_dtype(dtype), parse_device(device), drop)
    if not predicts_next_token(network):
        raise SmoothQuantError(does_not_continue(model, type(network).__name__))
    tokenizer = tokenizer_of(processor)
    if wants_int8_cache:
        from ..nn.int8_kv_cache import use_int8_cache_

        use_int8_cache_(network)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise SmoothQuantError(f"{model} has no chat template, so it is not a chat model: leave out --chat")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise SmoothQuantError(f"the chat template of {model} refuses the prompt: {first_line(error)}") from error
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    max_new_tokens = room_for(model, network, inputs.input_ids, max_new_tokens)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    sampling |= {"num_beams": 1, "num_return_sequences": 1}  # words cannot be printed before the best beam is known
    start = time.perf_counter()
    tokens = cast(Any, network).generate(
        inputs.input_ids.to(network.device),
        attention_mask=inputs.attention_mask.to(network.device),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    count, seconds = tokens.shape[1] - inputs.input_ids.shape[1], time.perf_counter() - start
    err.print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second", style="dim", highlight=False)


def serve(
    model: Served,
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default accepts this machine only; 0.0.0.0 accepts all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    continuous_batching: Annotated[
        bool,
        typer.Option(
            "--continuous-batching",
            help="Answer requests together in one batch instead of one after the other: faster for many requests at a "
            "time, slower for a single one.",
        ),
    ] = False,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="With --continuous-batching: tokens in the cache for all requests together. Default: 16384.", min=256
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="With --continuous-batching: the temperature of all answers, because requests of one batch cannot "
            "choose it. 0 always takes the likeliest token. Default: the model's own.",
            min=0.0,
        ),
    ] = None,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="On a GPU: answer from CUDA graphs and a static cache. The first answers take a minute or more, later "
            "ones a fraction of the time.",
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
) -> None:
    """Starts an OpenAI-compatible HTTP server: chat, completions, streaming. Ctrl-C or SIGTERM ends it.

    Example: [bold]smoothquant serve smol-w8a8 --port 8000[/bold]

    Clients need the base URL http://127.0.0.1:8000/v1, any API key, and MODEL as the model's name. GET /health returns
    200 while the server is up. This is transformers' server with 8-bit kernels; it needs smoothquant-ext\\[serve].
    """
    from ..integrations import serving
    from ..models import loads_as_here

    parse_dtype(dtype)
    if cache_tokens is not None and not continuous_batching:
        raise SmoothQuantError("--cache-tokens needs --continuous-batching: give both or neither")
    if temperature is not None:
        if not continuous_batching:
            raise SmoothQuantError("--temperature needs --continuous-batching: otherwise each request says its own")
        check_temperature(temperature)
    if compile_ and continuous_batching:
        raise SmoothQuantError("--compile has no effect on --continuous-batching, which has CUDA graphs of its own")
    batching = serving.Batching(cache_tokens or serving.CACHE_TOKENS, temperature) if continuous_batching else None
    where = str(parse_device(device))
    with loads_as_here(model, drop or ()):
        serving.serve(model, host, port, dtype, where, batching, compile_)


def chat(
    model: Served,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; higher values are more random.", min=0.0)
    ] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
) -> None:
    """Starts a chat with an instruction-tuned model in the terminal. Type !help for the chat's commands.

    Example: [bold]smoothquant chat smol-w8a8[/bold]

    This is transformers' chat with a local server on 8-bit kernels; it needs smoothquant-ext\\[serve].
    """
    from ..integrations import serving
    from ..models import loads_as_here

    parse_dtype(dtype)
    check_temperature(temperature)
    check_text("--system", system or "")
    where = str(parse_device(device))
    with loads_as_here(model, drop or ()):
        serving.chat(model, dtype, where, system, max_new_tokens, temperature)
