// Starts the page: reads what the server serves, then keeps watching it.

import { BudgetPanel } from "./budget.js";
import { byId, calm, element, pause, say } from "./element.js";
import { Hundred } from "./hundred.js";
import { Journey } from "./journey.js";
import { showAsSeen, watchPictures } from "./picture.js";
import { SAMPLES, sampleBlob, sampleUrl } from "./samples.js";
import { readJson, readText } from "./server.js";
import { Traffic } from "./traffic.js";
import { className } from "./words.js";

const WATCH_MS = 2000;
const STREAM_WATCH_MS = 600; // while this page itself sends

function showProblem(problem) {
  byId("banner").hidden = false;
  say(byId("banner"), element("b", {}, problem.title ?? "This page failed"), ". ", problem.message);
}

function clearProblem() {
  byId("banner").hidden = true;
  byId("banner").replaceChildren();
}

function showState(text, ready = false) {
  say(byId("state"), text);
  byId("state").dataset.state = ready ? "ready" : "";
}

const trouble = (error) => (error.kind === "unreachable" ? "no connection" : "not ready");

// Tries until the server answers; it may still be warming up.
async function insist(read) {
  for (;;) {
    try {
      return await read();
    } catch (error) {
      if (error.kind !== "not-ready" && error.kind !== "unreachable") throw error;
      showState(trouble(error));
      showProblem(error);
      await pause(WATCH_MS);
    }
  }
}

function describe(model) {
  byId("n-exits").textContent = `${model.exits.length} exits`;
  byId("model-note").textContent =
    `The network is ${model.name}, version ${model.version}: ${model.exits.length} exits, ` +
    `${model.class_names.length} classes, pictures of ${model.input.width_px} × ${model.input.height_px} pixels.`;
  const strangers = SAMPLES.filter((name) => !model.class_names.includes(name));
  byId("classes-note").replaceChildren(
    strangers.length
      ? "This network knows other classes than the samples': it answers with the nearest it has. "
      : `It knows ${model.class_names.length} classes, and takes everything for one of them. `,
    element(
      "details",
      {},
      element("summary", {}, "Which classes?"),
      element("p", {}, model.class_names.map(className).join(", ")),
    ),
  );
}

function offerSamples(choose) {
  const buttons = SAMPLES.map((name) => {
    const image = element("img", { src: sampleUrl(name), alt: "", width: "32", height: "32" });
    const button = element("button", { type: "button", "aria-pressed": "false" }, image, className(name));
    button.addEventListener("click", () => choose(name));
    return button;
  });
  byId("samples").replaceChildren(...buttons.map((button) => element("li", {}, button)));
  return (chosen) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(SAMPLES[i] === chosen)));
}

async function start() {
  const model = await insist(() => readJson("model"));
  const frontier = await insist(() => readJson("budget/frontier"));
  await insist(() => readText("readyz"));
  describe(model);

  const traffic = new Traffic(model.exits.length);
  const journey = new Journey(model);
  let average; // of the last state
  const budget = new BudgetPanel(model, frontier, {
    changed(state) {
      journey.setBudget(state);
      hundred.setBudget(state);
      if (average !== state.average_mflops) traffic.restart();
      average = state.average_mflops;
    },
    failed: showProblem,
  });
  const hundred = new Hundred(model, { sent: look, failed: showProblem });

  async function look() {
    try {
      const { changes } = budget;
      const [state, metrics] = await Promise.all([readJson("budget"), readText("metrics")]);
      if (changes === budget.changes) budget.setState(state);
      traffic.read(metrics);
      budget.setLive(traffic.live);
      showState(`${model.name} is ready`, true);
      if (look.failed) clearProblem();
      look.failed = false;
    } catch (error) {
      look.failed = true;
      showState(trouble(error));
      showProblem(error);
    }
  }

  async function send(blob, truth, name) {
    const size = await showAsSeen(blob, model.input);
    const { width_px: width, height_px: height } = model.input;
    document.querySelector(".answer").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
    byId("seen").setAttribute("aria-label", size ? `${name}, as the network sees it` : "no preview");
    byId("seen-note").textContent = size
      ? `what the network sees: ${width} × ${height} pixels`
      : "this browser shows no preview";
    try {
      await journey.run(blob, truth);
      await look();
    } catch (error) {
      byId("answer").replaceChildren(
        element("p", { class: "problem" }, element("b", {}, error.title ?? "This page failed"), ". ", error.message),
      );
    }
  }

  const press = offerSamples(async (name) => {
    press(name);
    const truth = model.class_names.includes(name) ? name : null;
    await send(await sampleBlob(name), truth, className(name));
  });
  watchPictures(
    (file) => {
      press(null);
      send(file, null, file.name || "your picture");
    },
    (why) => byId("answer").replaceChildren(element("p", { class: "problem" }, why)),
  );

  await insist(() => budget.readAccess());
  await look();
  if (!look.failed) clearProblem();
  for (;;) {
    await pause(hundred.stop ? STREAM_WATCH_MS : WATCH_MS);
    if (!document.hidden) await look();
  }
}

start().catch(showProblem);
