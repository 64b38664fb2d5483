// The page: what is chosen, what plays, what is shown.

import { magnification, Picture, slotColours } from "./draw.js";
import { isolate } from "./isolate.js";
import { rowsAndColumns } from "./pixels.js";
import { Source } from "./source.js";
import { backends, Student } from "./student.js";

const $ = (id) => document.getElementById(id);
const picture = new Picture($("picture"));
const LAST = 20; // frames that times are the mean of

let about, ways, colours; // what export.json says; where the student can run; a colour for each slot
let student, source; // what runs, and what it looks at
let fresh = true; // the next frame is its video's first
let playing = false;
let alone = null; // the slot that is shown without the others
let frames = 0; // segmented, of this source
let missed = 0; // shown while the student was at work on another
let times = []; // of the last frames
let current = Promise.resolve();

/** One thing at a time: stops what plays, waits for what is under way, then does it. Its errors are shown. */
function take(action) {
  playing = false;
  source?.pause();
  current = current.then(async () => {
    say("problem", "");
    try {
      await action();
    } catch (error) {
      say("problem", error.message);
      if (!student) say("status", "");
    }
    enable();
  });
}

/** Shows a text in a place of its own; an empty one hides it. */
function say(place, text) {
  $(place).textContent = text;
  $(place).hidden = !text;
}

function enable() {
  const ready = Boolean(student);
  for (const id of ["file", "camera"]) $(id).disabled = !ready;
  for (const id of ["form", "backend"]) $(id).disabled = !about;
  $("play").disabled = !ready || !source;
  $("step").disabled = !ready || !source || playing;
  $("play").textContent = playing ? "Pause" : "Play";
  $("camera").setAttribute("aria-pressed", String(Boolean(source?.live)));
}

// --- the student -----------------------------------------------------------------------------------------------------

async function begin() {
  $("unserved").remove();
  if (!("requestVideoFrameCallback" in HTMLVideoElement.prototype)) {
    throw new Error("This browser is too old: it does not tell the frames of a video (requestVideoFrameCallback)");
  }
  const isolation = await isolate();
  about = await description();
  const { found, note } = await backends(isolation);
  ways = found;
  say("note", note);
  colours = slotColours(about.num_slots);
  const name = about.source.split("/").at(-1); // not all of a path of the machine that exported it
  const patches = `${rowsAndColumns(about.grid).join(" × ")} patches`;
  $("about").textContent = `${name}: ${about.num_slots} slots on ${patches}. The video stays on this machine.`;
  const forms = Object.entries(about.forms).filter(([file]) => file.endsWith(".onnx"));
  for (const [file, { precision, bytes }] of forms) {
    $("form").add(new Option(`${precision}, ${(bytes / 1e6).toFixed(1)} MB`, file));
  }
  for (const { name } of ways) $("backend").add(new Option(name));
  $("slots").replaceChildren(...colours.map(slotButton));
  await openStudent();
}

async function description() {
  const answer = await fetch("export.json");
  if (!answer.ok) throw new Error(`There is no export.json beside this page (${answer.status} ${answer.statusText})`);
  return answer.json();
}

/** Opens the chosen form where it is to run; where that fails on a GPU, on the next best. */
async function openStudent() {
  student?.close();
  student = null;
  enable();
  const file = $("form").value;
  for (;;) {
    const way = ways[$("backend").selectedIndex];
    say("status", `Loading ${file} …`);
    const opened = new Student();
    try {
      await opened.open(about, file, way);
      student = opened;
      say("status", `Runs on ${way.name}.`);
      return;
    } catch (error) {
      opened.close();
      if (!way.gpu) throw error;
      say("note", `WebGPU failed, so it runs without: ${error.message}`);
      $("backend").selectedIndex += 1;
    }
  }
}

// --- frames ----------------------------------------------------------------------------------------------------------

/** Segments and draws the frame that the source shows. */
async function segment() {
  const started = performance.now();
  const image = source.grab();
  const scale = magnification(image.width, image.height);
  const grabbed = performance.now();
  const { rgba, labels, ms } = await student.segment(image.data, image.width, image.height, scale, fresh);
  const answered = performance.now();
  fresh = false;
  frames += 1;
  picture.show(new ImageData(rgba, image.width, image.height), labels, scale);
  draw();
  const now = performance.now();
  const prepare = grabbed - started + ms.prepare;
  times = [...times, { now, all: now - started, prepare, run: ms.run, draw: ms.draw + now - answered }].slice(-LAST);
  tell();
}

function draw() {
  picture.draw(colours, $("opacity").value / 100, alone);
}

/** A part's ms in the last frames. */
function mean(part) {
  return times.reduce((sum, time) => sum + time[part], 0) / times.length;
}

/** The numbers below the picture. */
function tell() {
  for (const part of ["prepare", "run", "draw"]) $(part).textContent = `${mean(part).toFixed(1)} ms`;
  const seconds = (times.at(-1).now - times[0].now) / 1000;
  $("rate").textContent = playing && times.length > 1 ? ((times.length - 1) / seconds).toFixed(1) : "–";
  const speed = playing && source.speed < 1 ? ` · at ${source.speed.toFixed(2)} × its speed` : "";
  const left = missed ? ` · ${missed} left out` : "";
  $("place").textContent = `${source.name} · frame ${frames - 1}, ${source.time.toFixed(2)} s${speed}${left}`;
}

async function play() {
  if (source.ended) await restart();
  playing = true;
  enable();
  slow();
  times = [];
  await source.play();
  try {
    for (let before = source.time; playing && (await source.next()); before = source.time) {
      if (!source.live) missed += Math.max(0, Math.round((source.time - before) / source.interval) - 1);
      await segment();
      slow();
    }
  } finally {
    playing = false;
    source.pause();
  }
}

/** Plays as slowly as the student needs to see every frame, as it does in `slotmatch segment`. */
function slow() {
  source.speed = (900 * source.interval) / mean("all");
}

async function step() {
  if (source.ended) await restart();
  else if (await source.step()) await segment();
}

async function restart() {
  await source.rewind();
  [fresh, frames, missed, times] = [true, 0, 0, []];
  await segment();
}

async function open(opening) {
  source?.close();
  source = null;
  source = await opening();
  [fresh, frames, missed, times, alone] = [true, 0, 0, [], null];
  $("picture").hidden = false;
  $("hint").hidden = true;
  mark();
  await segment();
}

// --- one object alone ------------------------------------------------------------------------------------------------

function show(slot) {
  alone = slot === alone ? null : slot;
  mark();
  draw();
}

function mark() {
  [...$("slots").children].forEach((button, n) => button.setAttribute("aria-pressed", String(n === alone)));
}

function slotButton([red, green, blue], n) {
  const button = document.createElement("button");
  button.innerHTML = '<svg viewBox="0 0 10 10" aria-hidden="true"><rect width="10" height="10" rx="2" /></svg>';
  button.querySelector("rect").setAttribute("fill", `rgb(${red}, ${green}, ${blue})`);
  button.append(`${n}`);
  button.setAttribute("aria-label", `Slot ${n} alone`);
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => show(n);
  return button;
}

// --- what is pressed -------------------------------------------------------------------------------------------------

$("file").onchange = ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (file) take(() => open(() => Source.file(file)));
};
$("camera").onclick = () => {
  if (source?.live) take(stop);
  else
    take(async () => {
      await open(Source.camera);
      take(play);
    });
};
$("play").onclick = () => (playing ? take(() => {}) : take(play));
$("step").onclick = () => take(step);
$("opacity").oninput = draw;
$("picture").onclick = ({ clientX, clientY }) => {
  const box = $("picture").getBoundingClientRect();
  show(picture.slotAt((clientX - box.left) / box.width, (clientY - box.top) / box.height));
};
for (const id of ["form", "backend"]) {
  $(id).onchange = () =>
    take(async () => {
      await openStudent();
      fresh = true; // the new one has not seen the frames before
      if (!source) return;
      frames -= 1;
      await segment();
    });
}

function stop() {
  source.close();
  source = null;
}

// For the console, and for tests: the labels of the frame that is shown, in its own size.
window.slotmatch = { shown: () => ({ frame: frames - 1, time: source.time, ...picture.labels() }) };

take(begin);
