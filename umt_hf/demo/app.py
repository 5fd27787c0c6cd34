"""The page: a clip, a tab for each model, and what it says. A Space runs this file as its `app.py`."""

import base64
import functools
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub.constants import HF_HOME
from PIL import Image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
try:
    import gradio as gr
    from gradio.components import Component
except ImportError as error:
    raise ImportError("The demo needs Gradio. Install it with `pip install 'umt_hf[demo]'`.") from error

# Absolute, since a Space has a copy of this file outside the package.
from umt_hf.data.lists.folders import format_name
from umt_hf.demo.first_look import CLIP, StoredViewer
from umt_hf.demo.limits import RequestTimeoutError, TimeLimit
from umt_hf.demo.looks import TeacherLook
from umt_hf.demo.models import (
    REMEMBERED_CLIPS,
    DemoModels,
    FoundClip,
    check_clip,
    choose_examples,
    describe_problem,
    load_demo_models,
)
from umt_hf.demo.settings import SETTINGS_FILE, DemoSettings, name_option, name_variable
from umt_hf.demo.zero_gpu import ask_model, register_page

HEADER = """# Unmasked Teacher
Pick a clip, then see what the video models make of it. ([Paper](https://arxiv.org/abs/2303.16058))
"""
MASK_TYPES = [("attention (the paper's)", "attention"), ("tube", "tube"), ("random", "random")]
MAX_HITS = 8
SECONDS_TO_REPEAT = 5.0  # after which what is wrong with a clip is said anew
MAX_REMEMBERED_MESSAGES = 1000
STORED_LOOK = (
    "No teacher is loaded. The saliency is a stored one: of a small teacher, trained on such clips, and of the "
    "clip that comes with the package alone."
)
NO_TEACHER = "The stored saliency is that of the clip of the package. A look at this one needs a teacher."
T = TypeVar("T")

# Fonts of the visitor's system: the page loads nothing from elsewhere.
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # Labels of fields look like text, and not like tags.
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    # What can be written in or ticked has an edge.
    input_border_width="1px",
    input_border_color="*neutral_300",
    checkbox_border_width="1px",
    checkbox_border_color="*neutral_400",
    checkbox_label_border_width="1px",
    checkbox_label_border_color="*neutral_200",
    button_secondary_border_color="*neutral_300",
    button_border_width="1px",
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
#labels { min-height: 220px; }
#found { min-height: 160px; }
#answer { min-height: 90px; }
#labels h2, #answer h2 { font-size: 22px; padding: 8px; }
#look, #look > div { padding: 0; }
.frames { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px 6px; }
@media (min-width: 640px) { .frames { grid-template-columns: repeat(auto-fit, minmax(56px, 1fr)); } }
.frames figure { margin: 0; }
.frames img { display: block; width: 100%; margin: 0 0 4px; border-radius: 4px; }
.frames figcaption { font-size: 12px; text-align: center; color: var(--body-text-color-subdued); }
"""


def build_demo(settings: DemoSettings) -> gr.Blocks:
    """Load the models and lay out the page; `launch_demo` shows it.

    Args:
        settings: Models and videos.

    Raises:
        ImportError: If LanceDB is missing and a search is asked for.
        OSError: If there is no such model.
        ValueError: If a model is of another kind, or the folder of videos holds none.
    """
    return _lay_out(load_demo_models(settings), settings)


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
    demo = _lay_out(models, settings)
    demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,  # its hints are for those who call `launch`
        prevent_thread_lock=True,
        allowed_paths=[str(CLIP), *models.videos, *(models.searcher.paths if models.searcher else [])],
        max_file_size=f"{settings.max_upload_mb}mb",
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


@dataclass(frozen=True)
class _Follower:
    """A tab that answers whenever the clip changes.

    Args:
        name: Of what answers, which works on one request at a time.
        answer: Called with the values of the inputs, the first of which is the clip.
        inputs: Components.
        output: Component of the answer.
        nothing: Value of the empty output, in JavaScript.
        is_ready: Whether its model is loaded.
    """

    name: str
    answer: Callable
    inputs: list[Component]
    output: Component
    nothing: str = "{}"
    is_ready: Callable[[], bool] = lambda: True

    def answer_clip(self, video: str | None, *values: Any) -> Any:
        """The answer, or nothing where there is no clip or no model yet, or where a message says what is wrong."""
        if video is None or not self.is_ready():
            return None
        try:
            check_clip(video)
        except ValueError:
            return None  # of a clip that came after the one that was checked; its own check says what is wrong
        try:
            return self.answer(video, *values)
        except gr.Error as error:
            # Not raised: after an event that failed, Gradio forgets the clip that waits to be next.
            gr.Warning(error.message, duration=error.duration, title=error.title)
            return None


@dataclass(frozen=True)
class _Visit:
    """What all tabs share: the page, its clip, and how the work of a request is run."""

    page: gr.Blocks
    clip: gr.Video
    limit: TimeLimit
    models: DemoModels
    number: int

    def ask(self, part: str, method: str, *values: Any) -> Any:
        """What a method of one of the models gives, on the device that is there for it."""
        _require(getattr(self.models, part))
        return ask_model(self.number, part, method, *values)

    def run(self, work: Callable[[], T], video: str | None = None) -> T:
        """Result of a request's work; what is wrong is shown in the page, and nothing of the server."""
        try:
            return self.limit.run(work)
        except RequestTimeoutError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except ValueError as error:  # a VideoDecodingError is one
            message = describe_problem(error, [] if video is None else [video])
            raise gr.Error(message, print_exception=False) from error

    def follow_clip(self, followers: Sequence[_Follower]) -> None:
        """Answer at the first visit and whenever the clip changes; a clip that cannot be read is named once."""
        outputs = [follower.output for follower in followers]
        nothing = ", ".join(follower.nothing for follower in followers)
        triggers: list[Any] = [self.page.load, self.clip.change]

        said: dict[tuple[str | None, str], float] = {}  # when a visitor read what is wrong with a clip

        def check(video: str | None, request: gr.Request) -> list:
            if video is None:
                return [gr.skip() for _ in outputs]
            try:
                self.run(lambda: check_clip(video), video)
            except gr.Error as error:
                # A busy page says of one clip twice that it has changed.
                now, key = time.monotonic(), (request.session_hash, video)
                is_new = now - said.get(key, -SECONDS_TO_REPEAT) >= SECONDS_TO_REPEAT
                if len(said) > MAX_REMEMBERED_MESSAGES:
                    said.clear()
                said[key] = now
                raise gr.Error(error.message, visible=is_new, print_exception=False) from error
            return [gr.skip() for _ in outputs]

        # Emptied in the browser, at once: nobody reads one clip's answer below another. Not a chain: older Gradios
        # run nothing after an event that has JavaScript alone.
        gr.on(triggers, None, None, outputs, js=f"() => [{nothing}]", api_visibility="private")
        checked: Any = gr.on(triggers, check, self.clip, outputs, trigger_mode="multiple", api_visibility="private")
        for follower in followers:
            # While a model works on one clip, only the last of those picked meanwhile is next.
            checked.success(
                follower.answer_clip,
                follower.inputs,
                follower.output,
                trigger_mode="always_last",
                concurrency_id=follower.name,
                api_visibility="private",
            )


def _lay_out(models: DemoModels, settings: DemoSettings) -> gr.Blocks:
    limit = TimeLimit(settings.timeout_seconds)
    for model in models.list_modules():
        limit.watch(model)
    examples = choose_examples(models.videos)
    with gr.Blocks(title="Unmasked Teacher", analytics_enabled=False) as demo:
        gr.Markdown(HEADER)
        with gr.Row():
            with gr.Column(min_width=320):
                clip = gr.Video(
                    examples[0][0],
                    label="Clip",
                    show_label=False,
                    sources=["upload"],
                    height=260,
                    loop=True,
                    autoplay=True,
                    elem_id="clip",
                )
            with gr.Column(min_width=320):
                _add_examples(examples, clip)
        visit = _Visit(demo, clip, limit, models, register_page(models))
        with gr.Tabs(selected=_choose_tab(models)):
            with gr.Tab("Teacher", id="Teacher"):
                followers = [_add_teacher(visit)]
            with gr.Tab("Labels", id="Labels"):
                followers += _fill_tab(visit, _add_labels, models.classifier, "classifier")
            with gr.Tab("Search", id="Search"):
                followers += _fill_tab(visit, _add_search, models.searcher, "video_text", "videos")
            with gr.Tab("Ask", id="Ask"):
                followers += _fill_tab(visit, _add_ask, models.answerer, "question_answering")
        visit.follow_clip(followers)
    return demo.queue(max_size=settings.max_waiting)


def _choose_tab(models: DemoModels) -> str:
    """The first tab of a model that the demo was given; without any, the one that shows stored saliency."""
    given = {
        "Teacher": not isinstance(models.viewer, StoredViewer),
        "Labels": models.classifier is not None,
        "Search": models.searcher is not None,
        "Ask": models.answerer is not None,
    }
    return next((name for name, is_given in given.items() if is_given), "Teacher")


def _add_examples(examples: Sequence[tuple[str, Image.Image]], clip: gr.Video) -> None:
    gr.Markdown("Upload a clip, or tap an example to pick it.")
    gallery = _build_gallery([picture for _, picture in examples], "examples")

    def pick_example(place: int) -> Any:
        return examples[place][0] if 0 <= place < len(examples) else gr.skip()

    _follow_picks(gallery, pick_example, [], clip)


def _add_labels(visit: _Visit) -> list[_Follower]:
    gr.Markdown("Which of the classes it was trained on the classifier sees in the clip.")
    labels = gr.Label(label="Top 5", show_label=False, num_top_classes=5, elem_id="labels")
    button = gr.Button("Classify")

    @functools.lru_cache(REMEMBERED_CLIPS)
    def find_labels(path: str, _num_bytes: int) -> dict[str, float]:
        # Gradio shows labels as a dictionary.
        return {scored.label: scored.probability for scored in visit.ask("classifier", "classify", path)}

    def classify(video: str | None) -> dict[str, float]:
        path = _require_clip(video)
        return visit.run(lambda: find_labels(path, os.path.getsize(path)), path)

    button.click(classify, visit.clip, labels, concurrency_id="labels", api_name="classify")
    return [_Follower("labels", classify, [visit.clip], labels, is_ready=lambda: visit.models.classifier is not None)]


def _add_teacher(visit: _Visit) -> _Follower:
    gr.Markdown(
        "The teacher, an image model, sees all of every frame. The student learns from it and sees only the patches "
        "that a mask leaves: at random, but those the teacher attends to more often."
    )
    viewer = visit.models.viewer
    if isinstance(viewer, StoredViewer):
        gr.Markdown(f"{STORED_LOOK} {_describe_missing('teacher')}")
    conversion = _offer_conversion(visit, "student")
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
    again = gr.Button("New mask")
    picture = gr.HTML(elem_id="look", min_height=240)
    seed = gr.State(0)

    # A clip may be said to have changed twice, and is not looked at twice. (Its folder is named by its contents, and
    # Gradio copies it there anew.) Conversion exchanges the viewer.
    @functools.lru_cache(REMEMBERED_CLIPS)
    def find_look(path: str, _num_bytes: int, _viewer: int, *mask: Any) -> TeacherLook:
        return visit.ask("viewer", "look", path, *mask)

    def look(video: str | None, mask_type: str, mask_ratio: float, seed: int) -> str:
        path = _require_clip(video)
        viewer = visit.models.viewer
        if isinstance(viewer, StoredViewer) and not viewer.knows(path):
            return f"<p>{NO_TEACHER}</p>"
        mask = (mask_type, mask_ratio, seed)
        return format_look(visit.run(lambda: find_look(path, os.path.getsize(path), id(viewer), *mask), path))

    def look_again(video: str | None, mask_type: str, mask_ratio: float, seed: int) -> tuple[str, int]:
        return look(video, mask_type, mask_ratio, seed + 1), seed + 1

    def redraw(video: str | None, mask_type: str, mask_ratio: float, seed: int) -> str | None:
        return None if video is None else look(video, mask_type, mask_ratio, seed)

    inputs: list[Component] = [visit.clip, kind, ratio, seed]
    options = {"concurrency_id": "teacher"}
    again.click(look_again, inputs, [picture, seed], **options)
    # While a slider moves, only its last place is drawn.
    ratio.change(redraw, inputs, picture, trigger_mode="always_last", api_name="look", **options)
    kind.input(redraw, inputs, picture, trigger_mode="always_last", api_visibility="private", **options)
    follower = _Follower("teacher", look, inputs, picture, '""')
    if conversion is not None:
        conversion.success(follower.answer_clip, inputs, picture, concurrency_id="teacher", api_visibility="private")
    return follower


def _add_search(visit: _Visit) -> list[_Follower]:
    gr.Markdown(f"{_describe_search(visit.models)} Tap a result to make it the clip above.")
    query = gr.Textbox(label="What the video shows", placeholder="a dog runs", max_lines=1)
    rerank = gr.Checkbox(
        label="Re-rank",
        info="Let the matching head look at the 32 best.",
        visible=visit.models.searcher is None or visit.models.searcher.has_matching_head,
    )
    button = gr.Button("Search", variant="primary")
    gallery = _build_gallery(None, "found")
    found = gr.State([])

    def search(text: str | None, is_reranked: bool) -> tuple[list[tuple[Image.Image, str]], list]:
        _require(visit.models.searcher)
        hits = visit.run(lambda: visit.ask("searcher", "search", text or "", MAX_HITS, is_reranked))
        captions = write_captions(hits)
        pictures = [hit.picture for hit in hits]
        return list(zip(pictures, captions, strict=True)), [[hit.path, hit.start_seconds] for hit in hits]

    def search_anew(text: str | None, is_reranked: bool) -> Any:
        return search(text, is_reranked) if (text or "").strip() else (None, [])

    def pick_found(place: int, found: list) -> Any:
        if not 0 <= place < len(found):
            return gr.skip()
        path, seconds = found[place]
        gr.Info(f"{Path(path).name} is the clip now.", duration=4)
        return path if seconds is None else gr.Video(path, playback_position=seconds)

    outputs: list[Component] = [gallery, found]
    gr.on([button.click, query.submit], search, [query, rerank], outputs, concurrency_id="search", api_name="search")
    rerank.input(
        search_anew,
        [query, rerank],
        outputs,
        trigger_mode="always_last",
        concurrency_id="search",
        api_visibility="private",
    )
    _follow_picks(gallery, pick_found, [found], visit.clip)
    return []


def _add_ask(visit: _Visit) -> list[_Follower]:
    gr.Markdown("The model answers in a word or two, and again for each clip that you pick.")
    question = gr.Textbox(label="Question about the clip", placeholder="what is the person doing?", max_lines=1)
    button = gr.Button("Ask", variant="primary")
    answer = gr.Label(label="Answer", show_label=False, elem_id="answer")

    @functools.lru_cache(REMEMBERED_CLIPS)
    def find_answer(path: str, _num_bytes: int, text: str) -> str:
        return visit.ask("answerer", "answer", path, text).answer

    def ask(video: str | None, text: str | None) -> str:
        path, _ = _require_clip(video), _require(visit.models.answerer)
        return visit.run(lambda: find_answer(path, os.path.getsize(path), text or ""), path) or "(no answer)"

    def ask_again(video: str, text: str | None) -> str | None:
        return ask(video, text) if (text or "").strip() else None

    inputs: list[Component] = [visit.clip, question]
    gr.on([button.click, question.submit], ask, inputs, answer, concurrency_id="ask", api_name="ask")
    return [_Follower("ask", ask_again, inputs, answer, is_ready=lambda: visit.models.answerer is not None)]


def write_captions(hits: Sequence[FoundClip]) -> list[str]:
    """Names of clips, with their folders where names are equal, where they begin, and the score that sorts them."""
    counts = Counter(Path(hit.path).name for hit in hits)
    captions = []
    for hit in hits:
        path = Path(hit.path)
        name = path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}"
        score = f"{hit.similarity:.2f}" if hit.matching_score is None else f"matching {hit.matching_score:.2f}"
        captions.append(f"{format_name(name)}{_format_second(hit)} · {score}")
    return captions


def _format_second(clip: FoundClip) -> str:
    """Where a clip that was found begins, as a player shows it; nothing where all of it was found."""
    if clip.start_seconds is None:
        return ""
    minutes, seconds = divmod(int(clip.start_seconds), 60)
    return f" {minutes}:{seconds:02d}"


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


def _follow_picks(gallery: gr.Gallery, pick: Callable, inputs: list[Component], clip: gr.Video) -> None:
    """Make the picture picked last the clip, in whatever order the answers to quick picks arrive.

    Args:
        gallery: Pictures.
        pick: Gives the path; called with the picture's place and the values of the inputs.
        inputs: Components.
        clip: The output.
    """
    # One request at a time, and after it one for the last of the picks meanwhile. For this one, Gradio repeats the
    # data of the first pick's event; what is marked in the page is the last pick's.
    items = f'[...document.querySelectorAll("#{gallery.elem_id} .thumbnail-item")]'
    place = f"{items}.findIndex(item => item.classList.contains('selected'))"
    gallery.select(
        pick,
        [gr.Number(precision=0, visible=False), *inputs],
        clip,
        js=f"(_, ...values) => [{place}, ...values]",
        trigger_mode="always_last",
        api_visibility="private",
    )


def _fill_tab(
    visit: _Visit, add: Callable[[_Visit], list[_Follower]], model: object | None, *settings: str
) -> list[_Follower]:
    """A tab of a model; how to give it one; or a button that converts the one that is not on this machine yet."""
    if model is not None:
        return add(visit)
    if settings[0] not in visit.models.pending:
        _explain_missing(*settings)
        return []
    waiting = gr.Column()
    with gr.Column(visible=False) as content:
        followers = add(visit)
    with waiting:
        converted = _offer_conversion(visit, settings[0])

    def show() -> list:
        is_pending = settings[0] in visit.models.pending
        return [gr.update(visible=is_pending), gr.update(visible=not is_pending)]

    shown: Any = converted.success(show, None, [waiting, content], queue=False, api_visibility="private")
    visit.page.load(show, None, [waiting, content], queue=False, api_visibility="private")
    for follower in followers:
        shown.success(follower.answer_clip, follower.inputs, follower.output, api_visibility="private")
    return followers


def _offer_conversion(visit: _Visit, setting: str) -> Any:
    """A button that converts a released checkpoint, where it is pending; the event after which it is loaded."""
    name = visit.models.pending.get(setting)
    if name is None:
        return None
    note = gr.Markdown(f"`{name}` is a released checkpoint that is not on this machine yet.", min_height=60)
    button = gr.Button("Convert it now", variant="primary")

    def convert() -> tuple[str, dict]:
        try:
            visit.models.convert(setting)
        except (OSError, RuntimeError, ValueError) as error:
            # Visitors need not know where the server keeps its files.
            raise gr.Error(str(error).replace(HF_HOME, "HF_HOME"), print_exception=False) from error
        for model in visit.models.list_modules():
            visit.limit.watch(model)
        return f"`{name}` is loaded.", gr.update(visible=False)

    hint = f"`{name}` is downloaded and converted, once, into the cache. This takes a minute or more."
    button.click(None, None, note, js=f"() => {json.dumps(hint)}", api_visibility="private")
    return button.click(convert, None, [note, button], concurrency_id="convert", api_visibility="private")


def _describe_search(models: DemoModels) -> str:
    if models.searcher is None:
        return "Searches the videos by text."
    unread = f" {len(models.searcher.skipped)} could not be read." if models.searcher.skipped else ""
    return f"Searches {models.searcher.num_videos} videos by text.{unread}"


def _describe_missing(*fields: str) -> str:
    options = " and ".join(f"`{name_option(field)}`" for field in fields)
    variables = " and ".join(f"`{name_variable(field)}`" for field in fields)
    return f"Start the demo with {options}, or set {variables}, to try yours."


def _explain_missing(*fields: str) -> None:
    gr.Markdown(f"Nothing here yet. {_describe_missing(*fields)}")


def _require(model: T | None) -> T:
    if model is None:
        raise gr.Error("This tab has no model yet.", print_exception=False)
    return model


def _require_clip(video: str | None) -> str:
    if video is None:
        raise gr.Error("Pick an example or upload a clip first.", print_exception=False)
    return video


if __name__ == "__main__":
    launch_demo(DemoSettings.load(Path(__file__).parent / SETTINGS_FILE))
