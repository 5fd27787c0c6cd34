"""The page: a clip, a tab for each model, and what it says. A Space runs this file as its `app.py`."""

import base64
import io
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The demo needs Gradio. Install it with `pip install 'umt_hf[demo]'`.") from error

# Absolute, since a Space has a copy of this file outside the package.
from umt_hf.demo.models import (
    DemoModels,
    FolderSearcher,
    TeacherLook,
    TeacherViewer,
    choose_examples,
    describe_problem,
    load_demo_models,
)
from umt_hf.demo.settings import SETTINGS_FILE, DemoSettings, name_option, name_variable
from umt_hf.inference.classification import VideoClassifier
from umt_hf.inference.question_answering import VideoAnswerer

HEADER = """# Unmasked Teacher
Pick a clip, then see what the video models make of it. ([Paper](https://arxiv.org/abs/2303.16058))
"""
MAX_FILE_SIZE = "500mb"
MASK_TYPES = [("attention (the paper's)", "attention"), ("tube", "tube"), ("random", "random")]
MAX_HITS = 8

# Fonts of the visitor's system: the page loads nothing from elsewhere.
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { width: 100%; max-width: 1120px !important; margin: 0 auto !important; }
.clips { border: none !important; background: none !important; overflow: visible !important; }
.clips .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; padding: 0; }
.clips .grid-container { padding: 0 !important; gap: 8px; grid-auto-rows: auto; grid-template-rows: none; }
.clips .gallery-item, .clips .thumbnail-item { aspect-ratio: 1; width: 100%; min-width: 0; height: auto; }
.clips .caption-label { left: 6px; right: 6px; bottom: 6px; max-width: none; padding: 2px 6px; font-size: 12px; }
.clips .icon-button-wrapper, .clips .empty { display: none; }
#examples .grid-container, #found .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); }
@media (max-width: 640px) { #found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
#clip button[aria-label^="Trim"], #clip button[aria-label^="Reset"] { display: none; }
footer .divider { display: none; }
#labels * { font-family: var(--font); }
#look, #look > div { padding: 0; }
.frames { display: grid; grid-template-columns: repeat(auto-fit, minmax(68px, 1fr)); gap: 14px 8px; }
.frames figure { margin: 0; }
.frames img { display: block; width: 100%; margin: 0 0 4px; border-radius: 4px; }
.frames figcaption { font-size: 12px; text-align: center; color: var(--body-text-color-subdued); }
"""


def build_demo(settings: DemoSettings) -> gr.Blocks:
    """Load the models and lay out the page; `launch_demo` shows it.

    Args:
        settings: Models and videos.

    Raises:
        ImportError: If FAISS is missing and a search is asked for.
        OSError: If there is no such model.
        ValueError: If a model is of another kind, or the folder of videos holds none.
    """
    return _lay_out(load_demo_models(settings))


def launch_demo(
    settings: DemoSettings,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page.

    Args:
        settings: Models and videos.
        host: Address to listen at; default: this machine alone, or what `GRADIO_SERVER_NAME` says.
        port: Default: the first free one from 7860 on, or `GRADIO_SERVER_PORT`.
        share: Whether Gradio makes a public link for a week; this needs the internet.
        block: Whether to serve until the process is interrupted.

    Returns:
        The page, with its address in `local_url`.
    """
    models = load_demo_models(settings)
    demo = _lay_out(models)
    demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,  # its hints are for those who call `launch`
        prevent_thread_lock=True,
        allowed_paths=[*models.videos, *(models.searcher.paths if models.searcher else [])],
        max_file_size=MAX_FILE_SIZE,
        theme=THEME,
        css=CSS,
        footer_links=["gradio"],
        ssr_mode=False,
        _frontend=False,  # no check that the page answers within 3 seconds, which a busy machine fails
    )
    hint = demo.share_url or "`umt-hf demo --share` makes a public link"
    sys.stdout.write(f"The page is at {demo.local_url} ({hint}); Ctrl-C ends it.\n")
    sys.stdout.flush()
    if block:
        demo.block_thread()
    return demo


def _lay_out(models: DemoModels) -> gr.Blocks:
    with gr.Blocks(title="Unmasked Teacher", analytics_enabled=False) as demo:
        gr.Markdown(HEADER)
        with gr.Row():
            with gr.Column(min_width=320):
                clip = gr.Video(label="Clip", sources=["upload"], height=260, loop=True, elem_id="clip")
            with gr.Column(min_width=320):
                _add_examples(models.videos, clip)
        with gr.Tabs():
            with gr.Tab("Labels"):
                _add_labels(models.classifier, clip)
            with gr.Tab("Teacher"):
                _add_teacher(models.viewer, clip)
            with gr.Tab("Search"):
                _add_search(models.searcher, clip)
            with gr.Tab("Ask"):
                _add_ask(models.answerer, clip)
    return demo


def _add_examples(videos: Sequence[str], clip: gr.Video) -> None:
    examples = choose_examples(videos)
    if not examples:
        gr.Markdown("Upload a clip, or start the demo with `--videos` to have some to pick from.")
        return
    gr.Markdown("Examples: tap one to pick it.")
    gallery = _build_gallery([picture for _, picture in examples], "examples")

    def pick_example(event: gr.SelectData) -> str:
        return examples[event.index][0]

    gallery.select(pick_example, None, clip)


def _add_labels(classifier: VideoClassifier | None, clip: gr.Video) -> None:
    if classifier is None:
        _explain_missing("classifier")
        return
    gr.Markdown("Which of the classes it was trained on the classifier sees in the clip.")
    button = gr.Button("Classify", variant="primary")
    labels = gr.Label(label="Top 5", num_top_classes=5, elem_id="labels")

    def classify(video: str | None) -> dict[str, float]:
        with _shown_errors(video):
            # Gradio shows labels as a dictionary.
            found = classifier.classify(_require_clip(video))
        return {scored.label: scored.probability for scored in found}

    button.click(classify, clip, labels)
    clip.change(_forget, None, labels)


def _add_teacher(viewer: TeacherViewer | None, clip: gr.Video) -> None:
    if viewer is None:
        _explain_missing("teacher")
        return
    gr.Markdown(
        "The teacher, an image model, sees all of every frame. The student learns from it and sees only the patches "
        "that a mask leaves: at random, but those the teacher attends to more often."
    )
    with gr.Row():
        ratio = gr.Slider(
            0,
            0.95,
            viewer.config.mask_ratio,
            step=0.05,
            label="Mask ratio",
            info="Share of the patches hidden.",
            min_width=280,
        )
        kind = gr.Radio(
            MASK_TYPES,
            value=viewer.config.mask_type,
            label="Mask",
            info="Tube: the same patches in every frame. Random: any.",
            min_width=280,
        )
    with gr.Row():
        button = gr.Button("Look", variant="primary", min_width=120)
        again = gr.Button("New mask", min_width=120)
    seed = gr.State(0)
    picture = gr.HTML(elem_id="look")

    def look(video: str | None, mask_type: str, mask_ratio: float, seed: int) -> str:
        with _shown_errors(video):
            return format_look(viewer.look(_require_clip(video), mask_type, mask_ratio, seed))

    def look_again(video: str | None, mask_type: str, mask_ratio: float, seed: int) -> tuple[str, int]:
        return look(video, mask_type, mask_ratio, seed + 1), seed + 1

    def redraw(video: str | None, mask_type: str, mask_ratio: float, seed: int) -> str | None:
        return None if video is None else look(video, mask_type, mask_ratio, seed)

    inputs = [clip, kind, ratio, seed]
    button.click(look, inputs, picture)
    again.click(look_again, inputs, [picture, seed])
    # While a slider moves, only its last place is drawn.
    ratio.change(redraw, inputs, picture, trigger_mode="always_last", show_progress="hidden")
    kind.input(redraw, inputs, picture)
    clip.change(_forget, None, picture)


def _add_search(searcher: FolderSearcher | None, clip: gr.Video) -> None:
    if searcher is None:
        _explain_missing("video_text", "videos")
        return
    unread = f" {len(searcher.skipped)} could not be read." if searcher.skipped else ""
    gr.Markdown(f"Searches {searcher.num_videos} videos by text.{unread} Tap a result to make it the clip above.")
    query = gr.Textbox(label="What the video shows", placeholder="a dog runs", max_lines=1)
    rerank = gr.Checkbox(
        label="Re-rank", info="Let the matching head look at the 32 best.", visible=searcher.has_matching_head
    )
    button = gr.Button("Search", variant="primary")
    gallery = _build_gallery(None, "found")
    found = gr.State([])

    def search(text: str, is_reranked: bool) -> tuple[list[tuple[Image.Image, str]], list[str]]:
        with _shown_errors():
            hits = searcher.search(text, MAX_HITS, is_reranked)
        captions = [f"{Path(hit.path).name} · {hit.similarity:.2f}" for hit in hits]
        pictures = [hit.picture for hit in hits]
        return list(zip(pictures, captions, strict=True)), [hit.path for hit in hits]

    def pick_found(paths: list[str], event: gr.SelectData) -> str:
        gr.Info(f"{Path(paths[event.index]).name} is the clip now.", duration=4)
        return paths[event.index]

    gr.on([button.click, query.submit], search, [query, rerank], [gallery, found])
    gallery.select(pick_found, found, clip)


def _add_ask(answerer: VideoAnswerer | None, clip: gr.Video) -> None:
    if answerer is None:
        _explain_missing("question_answering")
        return
    gr.Markdown("The model answers in a word or two.")
    question = gr.Textbox(label="Question about the clip", placeholder="what is the person doing?", max_lines=1)
    button = gr.Button("Ask", variant="primary")
    answer = gr.Label(label="Answer", elem_id="answer")

    def ask(video: str | None, text: str) -> str:
        with _shown_errors(video):
            return answerer.answer(_require_clip(video), text).answer or "(no answer)"

    gr.on([button.click, question.submit], ask, [clip, question], answer)
    clip.change(_forget, None, answer)


def format_look(look: TeacherLook) -> str:
    """HTML of what teacher and student look at: a column of three pictures a frame, columns wrapping."""
    rows = {
        "clip": look.frames.clip,
        "saliency": look.frames.saliency,
        "what the student sees": look.frames.visible,
    }
    columns = []
    for t in range(len(look.frames.clip)):
        pictures = "".join(
            f'<img alt="frame {t + 1}: {name}" src="{_encode_picture(frames[t])}">' for name, frames in rows.items()
        )
        columns.append(f"<figure>{pictures}<figcaption>frame {t + 1}</figcaption></figure>")
    share = look.num_visible / look.num_patches
    text = (
        "Each frame, from top to bottom: the clip; the teacher's saliency over it, bright where it looks; the patches "
        f"that the student sees, {look.num_visible} of {look.num_patches} ({share:.0%})."
    )
    if look.agreement is not None:
        text += f" On these, the student's features agree with the teacher's to a cosine of {look.agreement:.2f}."
    return f'<p>{text}</p><div class="frames">{"".join(columns)}</div>'


def _encode_picture(frame: np.ndarray) -> str:
    """A frame `(H, W, 3)` in [0, 1] as a data URL."""
    file = io.BytesIO()
    Image.fromarray((frame * 255).round().astype(np.uint8)).save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _build_gallery(pictures: list[Image.Image] | None, name: str) -> gr.Gallery:
    """Pictures to tap on."""
    return gr.Gallery(
        pictures,
        show_label=False,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        elem_id=name,
        elem_classes="clips",
    )


def _explain_missing(*fields: str) -> None:
    options = " and ".join(f"`{name_option(field)}`" for field in fields)
    variables = " and ".join(f"`{name_variable(field)}`" for field in fields)
    gr.Markdown(f"Nothing here yet: start the demo with {options}, or set {variables}.")


def _require_clip(video: str | None) -> str:
    if video is None:
        raise gr.Error("Pick an example or upload a clip first.", print_exception=False)
    return video


@contextmanager
def _shown_errors(video: str | None = None) -> Generator[None]:
    """Show what is wrong with a visitor's input in the page, and nothing of the server."""
    try:
        yield
    except ValueError as error:  # a VideoDecodingError is one
        message = describe_problem(error, [] if video is None else [video])
        raise gr.Error(message, print_exception=False) from error


def _forget() -> None:
    """Clear a result of the clip before."""


if __name__ == "__main__":
    launch_demo(DemoSettings.load(Path(__file__).parent / SETTINGS_FILE))
