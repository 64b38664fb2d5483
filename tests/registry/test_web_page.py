"""`slotmatch export --format web`: what it writes, and, in a real browser, what the page does with it.

The browser is Chromium (`CHROMIUM`, or `chromium` on the path), and the page's runtime the folder that `ORT_WEB`
names, or `~/.cache/onnxruntime-web/package`: `npm pack onnxruntime-web && tar xzf onnxruntime-web-*.tgz` makes it.
"""

import functools
import json
import math
import os
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from places import ROOT
from tiny_models import tiny_model
from video_files import write_video

from jobs import export
from jobs._main import run
from pipeline.clips.sources.synthetic import SyntheticSettings, render_video
from pipeline.models import save_slot_model
from pipeline.models.exported import load_exported
from pipeline.models.pixels import label_maps
from pipeline.registry import export as stage
from pipeline.registry import web
from pipeline.segment.figures import slot_colours

RUNTIME = Path(os.environ.get("ORT_WEB", Path.home() / ".cache" / "onnxruntime-web" / "package"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
TEACHER = str(ROOT / "demo" / "teacher")


def summary(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def _compared_briefly():
    """Exports are compared on two frames instead of thirty: `test_export_stage.py` is about that."""
    with pytest.MonkeyPatch.context() as patch:
        frames, _ = render_video(SyntheticSettings(videos=1, frames=2), 0)
        patch.setattr(stage, "frames_of", lambda _: [np.stack(list(frames))])
        yield


def make_runtime(folder):
    """A folder with the names that onnxruntime-web has, and some that no page needs."""
    dist = folder / "dist"
    dist.mkdir(parents=True)
    (dist / "ort.wasm.bundle.min.mjs").write_text('x="ort-wasm-simd-threaded.wasm"')
    (dist / "ort.webgpu.bundle.min.mjs").write_text('y="ort-wasm-simd-threaded.asyncify.wasm"')
    for name in ("ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm", "ort.all.mjs"):
        (dist / name).write_text(f"of {name}")
    return folder


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_compared_briefly")
def test_a_page_has_its_models_and_its_runtime_beside_it(tmp_path, capsys):
    save_slot_model(tiny_model(), tmp_path / "model")
    out, runtime = tmp_path / "out", make_runtime(tmp_path / "runtime")
    words = [str(tmp_path / "model"), str(out), "--format", "web", "--runtime", str(runtime)]
    assert run(export.JOB, words) == 0
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    models = {"model.onnx", "model_fp16.onnx", "model_int8.onnx", "export.json"}
    below = {"ort.wasm.js", "ort.webgpu.js", "LICENSE", "ThirdPartyNotices.txt"}
    below |= {"ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm"}
    page = {path.name for path in web.PAGE.iterdir()}
    assert written == models | page | {f"runtime/{name}" for name in below}
    assert set(summary(capsys)["forms"]) == models - {"export.json"}
    assert "MIT License" in (out / "runtime" / "LICENSE").read_text()


def test_a_page_names_no_other_place():
    """And its modules import only what lies beside them."""
    files = {path.name: path.read_text() for path in web.PAGE.iterdir()}
    for name, text in files.items():
        assert [url for url in re.findall(r"https?://[\w./:-]+", text) if "localhost" not in url] == [], name
        assert set(re.findall(r'from "\./(.+)"', text)) <= set(files), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "web"], "--runtime DIR; `npm pack onnxruntime-web && tar xzf"),
        (["--format", "html", "--runtime", "x"], "'html' is none; valid: files, web"),
        (["--runtime", "x"], "--runtime goes with --format web"),
        (["--format", "web", "--runtime", "nowhere"], "nowhere/dist/ort.wasm.bundle.min.mjs"),
    ],
)
def test_a_page_without_its_runtime_is_refused(tmp_path, capsys, words, message):
    save_slot_model(tiny_model(), tmp_path / "model")
    assert run(export.JOB, [str(tmp_path / "model"), str(tmp_path / "out"), *words]) != 0
    assert message in summary(capsys)["error"]
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_is_not_whole_is_refused(tmp_path):
    runtime = make_runtime(tmp_path)
    (runtime / "dist" / "ort-wasm-simd-threaded.asyncify.wasm").unlink()
    with pytest.raises(ValueError, match=r"there is no .*asyncify\.wasm: --runtime names the folder"):
        web.runtime_files(runtime)


# --- in a browser -----------------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """A plain static server."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory, _compared_briefly):
    """The folder of the demo's teacher as a page, and where it is served."""
    if not (RUNTIME / "dist").is_dir():
        pytest.skip(f"onnxruntime-web is not in {RUNTIME} ({web.HOW_TO_GET} there, or ORT_WEB)")
    out = tmp_path_factory.mktemp("site")
    assert run(export.JOB, [TEACHER, str(out), "--format", "web", "--runtime", str(RUNTIME)]) == 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(out)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (pip install -c constraints.txt '.[browser]')",
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    """The page at a phone's width, ready; where a script failed or another host was asked, the test fails."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page, errors, hosts = context.new_page(), [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/", 3)[2]))
    page.goto(site[1])
    expect_text(page, "#status", "Runs on")
    yield page
    context.close()
    assert errors == []
    assert hosts - {""} == {site[1].split("/")[2]}  # a file of the user's is a blob, which has no host


def expect_text(page, selector, text):
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def overflows(page):
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A generated video whose frames are stored as RGB: browsers and FFmpeg turn YUV into RGB a level or two apart."""
    frames, _ = render_video(SyntheticSettings(videos=1, frames=12, size=128, fps=10), 0)
    path = tmp_path_factory.mktemp("clip") / "clip.webm"
    return write_video(path, list(frames), codec="libvpx-vp9", pix_fmt="gbrp")


def labels_in_python(model, path, number):
    """Of a frame, by onnxruntime."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    *_, (pixels, _, masks) = model.stream([frames[: number + 1]])
    return model.label_maps(masks, pixels.shape[1:3]).numpy()[number]


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(3, 5), (4, 4)])
def test_masks_of_any_grid_become_labels(page, grid):
    masks_TNP = torch.rand(1, 3, math.prod(grid), generator=torch.Generator().manual_seed(0))
    named = grid[0] if grid[0] == grid[1] else list(grid)  # as export.json names it
    found = page.evaluate(
        """async ([masks, grid]) => {
            const { labelMap } = await import("./pixels.js");
            return Array.from(labelMap(Float32Array.from(masks), 3, grid, 40, 24));
        }""",
        [masks_TNP.flatten().tolist(), named],
    )
    expected = label_maps(masks_TNP, grid, (24, 40))[0].numpy()
    assert (np.reshape(found, (24, 40)) == expected).mean() >= 0.99


@pytest.mark.slow
def test_the_page_segments_as_onnxruntime_does_in_python(page, site, clip):
    page.set_input_files("#file", clip)
    for number in range(6):
        expect_text(page, "#place", f"frame {number},")
        if number < 5:
            page.click("#step")
    shown = page.evaluate("slotmatch.shown()")
    found = np.reshape(shown["labels"], (shown["height"], shown["width"]))
    expected = labels_in_python(load_exported(site[0] / "model.onnx"), clip, 5)
    assert shown["time"] == pytest.approx(0.5)
    assert found.shape == expected.shape == (128, 128)
    assert len(np.unique(expected)) > 2
    assert (found == expected).mean() >= 0.99
    for part in ("#prepare", "#run", "#draw"):
        assert re.fullmatch(r"[\d.]+ ms", page.inner_text(part))
    fills = page.eval_on_selector_all("#slots rect", "all => all.map(rect => rect.getAttribute('fill'))")
    assert fills == ["rgb({}, {}, {})".format(*colour) for colour in slot_colours(6)]
    assert not overflows(page)

    page.click("#play")  # to the end, and its button is for the next time
    expect_text(page, "#place", "frame")
    expect_text(page, "#play", "Play")
    assert page.evaluate("slotmatch.shown().time") > 0.9


def colours_seen(page):
    """The picture's pixels, (height, width, 4)."""
    width, height, values = page.evaluate(
        """() => {
            const canvas = document.getElementById("picture");
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [pixels.width, pixels.height, Array.from(pixels.data)];
        }"""
    )
    return np.reshape(values, (height, width, 4))


@pytest.mark.slow
def test_a_click_shows_one_object_and_another_one_all(page, clip):
    page.set_input_files("#file", clip)
    expect_text(page, "#place", "frame 0,")
    all_slots = colours_seen(page)
    shown = page.evaluate("slotmatch.shown()")
    labels = np.reshape(shown["labels"], (shown["height"], shown["width"]))
    scale = len(all_slots) // len(labels)
    slot = labels[64, 64]
    page.click("#picture")  # in the middle
    assert page.get_attribute(f"#slots button:nth-child({slot + 1})", "aria-pressed") == "true"
    alone = colours_seen(page)[scale // 2 :: scale, scale // 2 :: scale]
    hidden = (alone[..., :3] == 17).all(-1)
    assert (hidden == (labels != slot)).mean() > 0.999
    page.click("#picture")
    assert (colours_seen(page) == all_slots).all()
    page.locator("#opacity").fill("0")
    assert (colours_seen(page)[scale // 2 :: scale, scale // 2 :: scale] != alone).any(-1)[
        labels != slot
    ].mean() > 0.9


@pytest.mark.slow
def test_what_went_wrong_is_said_on_the_page(page, browser, site, tmp_path):
    out, url = site
    (tmp_path / "notes.mp4").write_text("these are notes")
    page.set_input_files("#file", tmp_path / "notes.mp4")
    expect_text(page, "#problem", "notes.mp4 is not a video that this browser can play")
    page.click("#camera")
    expect_text(page, "#problem", "No camera was found on this machine")
    assert not overflows(page)

    without = browser.new_context(service_workers="block").new_page()
    without.goto(url)
    expect_text(without, "#note", "No WASM threads: ")
    expect_text(without, "#status", "Runs on WASM, 1 thread")
    (out / "model.onnx").rename(tmp_path / "model.onnx")
    try:
        without.reload()
        expect_text(without, "#problem", "There is no model.onnx beside this page (404")
    finally:
        (tmp_path / "model.onnx").rename(out / "model.onnx")
    without.goto((out / "index.html").as_uri())
    expect_text(without, "#unserved", "python3 -m http.server")
    without.context.close()
