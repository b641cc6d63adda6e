"use strict";
// The page of `vilg serve`: three forms, one request at a time, progress from server-sent events.

const $ = (selector, root = document) => root.querySelector(selector);
const draw = $("#draw"), read = $("#read"), results = $("#results");
let model = null, picture = null, task = "draw", running = null;

/** An element with properties, then children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });

// --- what the model is -------------------------------------------------------------------------

async function begin() {
  try {
    model = (await (await fetch("v1/models")).json()).data[0];
  } catch {
    return fail("the server does not answer; is it still running?");
  }
  document.title = `${model.id} · vilg`;
  const [unit, size] = [["B", 1e9], ["M", 1e6], ["k", 1e3]].find(([, least]) => model.parameters >= least);
  const parameters = `${number(model.parameters / size, 1)} ${unit}`;
  const facts = [model.id, `${parameters} parameters`, model.size.replace("x", " × "), model.device];
  $("#facts").replaceChildren(...facts.map((text) => make("span", { textContent: text })));
  draw.candidates.max = model.limits.candidates;
  for (const name of ["guidance", "temperature", "top_k", "top_p"]) draw[name].value = model.defaults[name];
  if (model.defaults.guidance > 10) draw.guidance.max = Math.ceil(model.defaults.guidance * 2);
  draw.guidance.value = model.defaults.guidance;
  showRanges();
}

function showRanges() {
  draw.n.max = draw.candidates.value;
  for (const range of draw.querySelectorAll("input[type=range]")) $("output", range.closest("label")).textContent = range.value;
}
draw.addEventListener("input", showRanges);

// --- tabs --------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(name) {
  if (running) return;
  task = name;
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", tab.id === `tab-${name}`);
    tab.tabIndex = tab.id === `tab-${name}` ? 0 : -1;
  }
  draw.hidden = name !== "draw";
  read.hidden = name === "draw";
  read.setAttribute("aria-labelledby", `tab-${name}`);
  $(".question").hidden = name !== "ask";
  read.question.required = name === "ask";
  idle();
  $("#error").hidden = true;
}
tabs.forEach((tab, place) => {
  tab.setAttribute("aria-controls", tab.id === "tab-draw" ? "draw" : "read");
  tab.addEventListener("click", () => choose(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: tabs.length - 1 }[event.key];
    if (step && !running) {
      const next = tabs[(place + step) % tabs.length];
      choose(next.id.slice(4));
      next.focus();
    }
  });
});

// --- the picture to read -----------------------------------------------------------------------

const drop = $(".drop");

function show(dataUrl) {
  picture = dataUrl;
  const image = $("img", drop);
  image.onload = () => image.classList.toggle("small", image.naturalWidth <= 128);
  image.src = dataUrl;
  image.hidden = false;
  $(".hint", drop).hidden = true;
  $("#error").hidden = true;
}

function load(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return fail(`${file.name}: is no picture`);
  // A file in base64 is a third longer, and is sent so.
  if (model && file.size * 1.34 > model.limits.megabytes * 1e6) {
    return fail(`${file.name} has ${number(file.size / 1e6, 1)} MB; the server takes ${number(model.limits.megabytes / 1.34, 1)} MB`);
  }
  const reader = new FileReader();
  reader.onload = () => show(reader.result);
  reader.onerror = () => fail(`${file.name}: cannot be read`);
  reader.readAsDataURL(file);
}
read.file.addEventListener("change", () => load(read.file.files[0]));
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    read.file.click();
  }
});
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
drop.addEventListener("drop", (event) => load(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (!file) return;
  if (task === "draw") choose("caption");
  load(file);
});

// --- asking the server -------------------------------------------------------------------------

function fail(message) {
  $("#error").textContent = message;
  $("#error").hidden = false;
}

function idle() {
  running = null;
  $("#status").hidden = true;
  const words = { draw: "Draw", caption: "Write a caption", ask: "Ask" };
  for (const button of document.querySelectorAll(".go")) {
    button.classList.remove("stop");
    button.textContent = words[task];
  }
}

/** The events of a stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice(part.indexOf("data: ") + 6));
  }
}

/** POST and follow; resolves to the result. Throws an Error with the server's message. */
async function ask(path, body, onProgress) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal: running.signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response)) {
    if (event.type === "completed") return event;
    if (event.type === "error") throw new Error(event.error.message);
    onProgress(event);
  }
  throw new Error("the connection to the server broke off");
}

/** Run one request with the panel showing where it stands. */
async function attempt(form, path, body, { onProgress = () => {}, onResult, onEnd = () => {} }) {
  running = new AbortController();
  $("#error").hidden = true;
  $("#empty")?.remove();
  const button = $(".go", form), status = $("#status"), started = performance.now();
  button.textContent = "Stop";
  button.classList.add("stop");
  status.hidden = false;
  note("sent", 0);
  let since = null;
  try {
    const result = await ask(path, body, (event) => {
      if (event.ahead) note(`${event.ahead} ${event.ahead === 1 ? "request" : "requests"} before yours`, 0);
      else if (event.total > 1) {
        since ??= { time: performance.now(), done: event.done };
        const seconds = (performance.now() - since.time) / 1000, done = event.done - since.done;
        const left = done ? (seconds * (event.total - event.done)) / done : 0;
        const images = (event.done / event.total) * (body.candidates ?? 1);
        const speed = seconds > 0.3 && done ? ` · ${number((images * done) / event.done / seconds, 1)} images/s · ${number(left, 0)} s left` : "";
        note(`${number(100 * (event.done / event.total))} %${speed}`, event.done / event.total);
      } else note("at work", 0);
      onProgress(event);
    });
    onResult(result, (performance.now() - started) / 1000);
  } catch (error) {
    if (error.name !== "AbortError") fail(error instanceof TypeError ? "the server does not answer; is it still running?" : error.message);
  } finally {
    onEnd();
    idle();
  }
}

function note(text, share) {
  $("#status").classList.toggle("waiting", share === 0);
  $("#status .bar div").style.width = share ? `${100 * share}%` : "";
  $("#status p").textContent = text;
}

/** Fields of a form that hold something, as numbers where they are. */
function filled(form, names) {
  const given = {};
  for (const name of names) {
    const field = form[name];
    if (field.value !== "") given[name] = ["number", "range"].includes(field.type) ? field.valueAsNumber : field.value;
  }
  return given;
}

// --- drawing -----------------------------------------------------------------------------------

draw.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const body = { ...filled(draw, ["prompt", "candidates", "n", "guidance", "seed", "temperature", "top_k", "top_p"]), partial_images: 7 };
  const tiles = make("div", { className: "tiles" });
  const pending = Array.from({ length: Math.min(body.candidates, 16) }, () => make("figure", { className: "tile" }, make("div", { className: "frame pending" })));
  tiles.append(...pending);
  const how = make("p", { className: "how", textContent: `drawing ${body.candidates}` });
  const run = make("article", { className: "run" }, make("h2", { textContent: body.prompt }), how, tiles);
  results.prepend(run);
  let drawn = false;
  attempt(draw, "v1/images/generations", body, {
    onProgress(event) {
      event.partial_images?.forEach((png, place) => {
        const frame = pending[event.first + place]?.firstChild;
        if (!frame) return;
        if (!frame.firstChild) frame.append(pictureOf(png, "half drawn"));
        else frame.firstChild.src = `data:image/png;base64,${png}`;
      });
    },
    onResult(result, seconds) {
      drawn = true;
      how.textContent = `${result.data.length} of ${body.candidates} · guidance ${result.sampling.guidance} · seed ${result.seed} · ${number(seconds, 1)} s`;
      tiles.replaceChildren(...result.data.map((each, rank) => tile(result, each, rank, body)));
    },
    onEnd: () => drawn || run.remove(),
  });
});
draw.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    draw.requestSubmit();
  }
});

function pictureOf(source, alt) {
  const image = make("img", { alt });
  image.onload = () => image.classList.toggle("small", image.naturalWidth <= 128);
  image.src = source.startsWith("data:") ? source : `data:image/png;base64,${source}`;
  return image;
}

function tile(result, each, rank, body) {
  const source = `data:image/png;base64,${each.b64_json}`;
  const best = rank === 0 && body.candidates > 1;
  const frame = make("button", { className: "frame", type: "button" }, pictureOf(source, body.prompt));
  const score = make("span", { textContent: each.score.toFixed(2).replace("-", "\u2212"), title: "log-probability per token of the prompt under this picture, by the model itself" });
  frame.addEventListener("click", () => view(source, `${body.prompt} · seed ${result.seed}, candidate ${each.candidate} · score ${each.score.toFixed(3).replace("-", "\u2212")}`));
  const save = make("a", { textContent: "Save", href: source, download: `vilg-${result.seed}-${each.candidate}.png` });
  const use = (name, word) => {
    const button = make("button", { textContent: word, type: "button" });
    button.addEventListener("click", () => { choose(name); if (!running) show(source); });
    return button;
  };
  const actions = make("span", { className: "do" }, save, use("caption", "Caption"), use("ask", "Ask"));
  const place = best ? make("b", { textContent: "best" }) : `# ${rank + 1}`;
  return make("figure", { className: `tile${best ? " best" : ""}` }, frame, make("figcaption", {}, make("span", {}, place, " · ", score), actions));
}

const viewer = $("#viewer");

function view(source, text) {
  viewer.replaceChildren(pictureOf(source, text), make("p", { textContent: text }));
  viewer.showModal();
}
viewer.addEventListener("click", () => viewer.close());

// --- captions and answers ----------------------------------------------------------------------

read.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  if (!picture) return fail("choose a picture first");
  const shown = picture, asking = task === "ask";
  const body = { image: shown, ...filled(read, ["language", "num_beams", "length_penalty"]) };
  if (asking) body.question = read.question.value;
  attempt(read, asking ? "v1/answers" : "v1/captions", body, {
    onResult(result, seconds) {
      const text = (asking ? result.answer : result.caption) || "(nothing)";
      const said = make("div", {}, make("p", { className: "text", textContent: text }), make("p", { className: "how", textContent: `${asking ? "answer" : "caption"} · ${number(seconds, 1)} s` }));
      if (asking) said.prepend(make("p", { className: "asked", textContent: body.question }));
      results.prepend(make("article", { className: "run said" }, pictureOf(shown, "what was read"), said));
    },
  });
});

choose("draw");
begin();
