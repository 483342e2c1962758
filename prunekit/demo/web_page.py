"""The gradio page and its server, without analytics and without fonts or scripts from other servers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunekit.demo.answering import LIMITS, Demo
from prunekit.demo.drawing import caption, explanation
from prunekit.runtime.errors import MissingPackageError, cannot_listen

STEPS = 25
FONTS = ["system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
KEPT_SECONDS = 3600  # time that a shown picture stays on disk
STYLE = """
.prunekit { --grid: #d9dce1; }
.dark .prunekit { --grid: #3a3f48; }
.prunekit svg text { fill: currentColor; }
.prunekit .figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.prunekit .figures figure { margin: 0; flex: 0 1 auto; max-width: min(100%, 26rem); }
.prunekit figure svg { display: block; max-width: 100%; height: auto; }
#dense-image img, #pruned-image img { width: 100%; height: 100%; object-fit: contain; }
.prunekit p { margin: .4rem 0; overflow-wrap: anywhere; }
.prunekit .small { font-size: .8rem; opacity: .75; max-width: 78ch; }
.prunekit .message { border-left: 4px solid #D55E00; padding: .4rem .8rem; }
footer { display: none !important; }
"""


def check_gradio() -> None:
    """Raise an ImportError that names the extra if gradio is missing."""
    if find_spec("gradio") is None:
        raise MissingPackageError("the demo needs gradio; pip install 'prunekit[demo]'")


def build(demo: Demo) -> Any:
    """Return the page as gradio.Blocks."""
    gradio = _gradio()
    count = demo.pipeline.num_experts
    pruned = "routed expert" if demo.has_router else "pruned"
    with gradio.Blocks(title=f"{demo.title} – prunekit", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as (
        page
    ):
        gradio.Markdown(f"# {_plain(demo.title)}\nOne prompt, the same noise: the dense model beside {_what(demo)}.")
        with gradio.Row():
            prompt = gradio.Textbox(label="Prompt", value=demo.examples[0], lines=1, scale=4, elem_id="prompt")
            draw = gradio.Button("Draw", variant="primary", scale=1, elem_id="draw")
        with gradio.Row():
            seed = gradio.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="seed")
            steps = gradio.Slider(1, LIMITS.steps, STEPS, step=1, label="Steps", elem_id="steps")
            guidance = gradio.Slider(
                0, LIMITS.guidance, demo.pipeline.mixture.guidance, step=0.1, label="Guidance", elem_id="guidance"
            )
        gradio.Examples([[text] for text in demo.examples], [prompt], label="Prompts to try")
        message = gradio.HTML(visible=False, elem_id="message", elem_classes="prunekit")
        with gradio.Row():
            images, captions = [], []
            for title, name in (("dense", "dense"), (pruned, "pruned")):
                with gradio.Column():
                    images.append(_image(gradio, title, name))
                    captions.append(gradio.HTML(elem_id=f"{name}-caption", elem_classes="prunekit"))
        why = gradio.HTML(elem_id="why", elem_classes="prunekit")

        def answer(prompt: str, seed: int, steps: int, guidance: float) -> list[Any]:
            try:
                reply = demo.answer(prompt, seed, steps, guidance)
                name = f"expert {reply.expert}" if count > 1 else "pruned"
                dense = "" if reply.dense is None else caption(reply.dense, "dense")
                shown = [reply.dense and reply.dense.image, dense, reply.pruned.image, caption(reply.pruned, name)]
                return [gradio.HTML(visible=False), *shown, explanation(demo, reply)]
            except (ValueError, OSError, RuntimeError) as error:
                print(f"prunekit: {_line(error)}", file=sys.stderr)
                text = f"<p class='message' role='alert'>{escape(_line(error))}</p>"
                return [gradio.HTML(text, visible=True), None, "", None, "", ""]

        given, shown = [prompt, seed, steps, guidance], [message, images[0], captions[0], images[1], captions[1], why]
        for event in (draw.click, prompt.submit):
            event(answer, given, shown, concurrency_limit=1, concurrency_id="draw", api_name=False)
    return page


def launch(demo: Demo, host: str = "127.0.0.1", port: int | None = None) -> tuple[Any, str]:
    """Start the server in threads; return the page, whose `close()` ends it, and its address.

    port: by default the first free port from 7860 on. Raises a one-line ValueError if the port is taken.
    """
    gradio = _gradio()
    page = build(demo)
    theme = gradio.themes.Base(font=FONTS, font_mono=["ui-monospace", "monospace"])
    look = {"theme": theme, "css": STYLE, "footer_links": [], "quiet": True}
    local = {"share": False, "ssr_mode": False, "enable_monitoring": False, "prevent_thread_lock": True}
    try:
        _, url, _ = page.queue().launch(server_name=host, server_port=port, **look, **local)
    except OSError as error:
        raise cannot_listen(host, port) from error
    return page, url


def serve(
    directory: Path, method: str | None, host: str, port: int | None, device: str | None, say: Callable[[str], None]
) -> None:
    """Open a run and serve its page until Ctrl-C. Errors as in `Demo` and `launch`; ImportError without gradio."""
    check_gradio()
    demo = Demo(directory, method, device)
    if demo.dense is None:
        say(demo.no_dense)
    page, url = launch(demo, host, port)
    try:
        say(f"The demo of {demo.title} is at {url} ; Ctrl-C stops it")
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
        say("The demo is stopped")


def _gradio() -> Any:
    """Import gradio with its analytics switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    check_gradio()
    import gradio

    return gradio


def _image(gradio: Any, title: str, name: str) -> Any:
    return gradio.Image(
        label=title, format="png", interactive=False, height=320, buttons=["download"], elem_id=f"{name}-image"
    )


def _what(demo: Demo) -> str:
    count = demo.pipeline.num_experts
    return f"the one of {count} pruned experts that the router chooses" if demo.has_router else "the pruned one"


def _plain(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "*_#`[]<>" else letter for letter in text)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
