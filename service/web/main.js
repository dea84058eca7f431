// Starts the page: reads the model and the budget from the server, then polls it.

import { BudgetPanel } from "./budget.js";
import { byId, calm, element, pause, problem, say } from "./element.js";
import { Hundred } from "./hundred.js";
import { Journey } from "./journey.js";
import { copyOf, mayBeCopied, readable, showAsSeen, watchPictures, whyNot } from "./picture.js";
import { SAMPLES, sampleBlob, sampleUrl } from "./samples.js";
import { passes, readJson, readText } from "./server.js";
import { Traffic } from "./traffic.js";
import { className, count } from "./words.js";

const WATCH_MS = 2000;
const STREAM_WATCH_MS = 600; // while this page sends images itself

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

const trouble = (error) => (["unreachable", "silent"].includes(error.kind) ? "no connection" : "not ready");

// Retries until the server answers; it may still be warming up.
async function insist(read) {
  for (;;) {
    try {
      return await read();
    } catch (error) {
      if (!passes(error)) throw error;
      showState(trouble(error));
      showProblem(error);
      await pause(WATCH_MS);
    }
  }
}

function describe(model) {
  byId("n-exits").textContent = count(model.exits.length, "exit");
  byId("model-note").textContent =
    `The network is ${model.name}, version ${model.version}: ${count(model.exits.length, "exit")}, ` +
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
  let average; // of the latest budget document
  const budget = new BudgetPanel(model, frontier, {
    changed(state) {
      journey.setBudget(state);
      hundred.setBudget(state);
      if (average !== state.average_mflops) traffic.restart();
      average = state.average_mflops;
    },
  });
  const hundred = new Hundred(model, look);
  let served; // the model, from the first metrics

  async function look() {
    try {
      const { changes } = budget;
      // A proxy may hide the metrics, with any status: then there are no live shares.
      const [state, metrics] = await Promise.all([readJson("budget"), readText("metrics").catch(() => null)]);
      if (look.ended) return;
      const serves = /^exitserve_model_info\{.*$/m.exec(metrics ?? "")?.[0];
      if (serves && serves !== (served ??= serves)) return replaced();
      if (changes === budget.changes) budget.setState(state);
      if (metrics !== null) traffic.read(metrics);
      budget.setLive(metrics === null ? null : traffic.live);
      showState(`${model.name} is ready`, true);
      if (look.failed) {
        // The server may have been replaced by one with another network, or other rules for the token.
        if (JSON.stringify(await readJson("model")) !== JSON.stringify(model)) return replaced();
        await budget.readAccess();
        clearProblem();
      }
      look.failed = false;
    } catch (error) {
      look.failed = true;
      showState(trouble(error));
      showProblem(error);
    }
  }

  // Exits, costs and the curve belong to the previous network: the page must be reloaded.
  function replaced() {
    look.ended = true;
    showState("another network");
    showProblem({
      title: "The server now serves another network",
      message: `This page still shows ${model.name}, version ${model.version}. `,
    });
    byId("banner").append(element("a", { href: "" }, "Reload the page"));
  }

  function show(picture, name) {
    const { width_px: width, height_px: height } = model.input;
    showAsSeen(picture, model.input);
    byId("seen").setAttribute("aria-label", picture ? `${name}, as the network sees it` : "no preview");
    byId("seen-note").textContent = picture
      ? `what the network sees: ${width} × ${height} pixels`
      : "this browser shows no preview";
  }

  // If the server does not accept a file but this browser can read it, send a copy as JPEG.
  async function classify(file, picture, truth, wanted) {
    try {
      await journey.run(file, truth);
    } catch (error) {
      if (!picture || !mayBeCopied(error, file)) throw error;
      const { blob, size } = await copyOf(picture, model.input);
      if (!wanted()) return;
      byId("seen-note").append(`. Sent: a still JPEG of ${size} made by this page, as the file ${whyNot(error)}.`);
      await journey.run(blob, truth);
    }
  }

  let newest = 0; // a large picture takes time to read, and another may be chosen meanwhile

  async function send(read, truth, name) {
    const mine = ++newest;
    journey.expect();
    document.querySelector(".answer").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
    let picture = null;
    try {
      const file = await read();
      picture = await createImageBitmap(file).catch(() => null);
      if (mine !== newest) return;
      show(picture, name);
      await classify(file, picture, truth, () => mine === newest);
      await look();
    } catch (error) {
      if (mine === newest) byId("answer").replaceChildren(problem(error));
    } finally {
      picture?.close();
    }
  }

  const press = offerSamples((name) => {
    press(name);
    send(() => sampleBlob(name), model.class_names.includes(name) ? name : null, className(name));
  });
  watchPictures(
    (file) => {
      press(null);
      send(() => readable(file), null, file.name || "your picture");
    },
    (why) => byId("answer").replaceChildren(element("p", { class: "problem" }, why)),
  );

  await insist(() => budget.readAccess());
  await look();
  if (!look.failed) clearProblem();
  while (!look.ended) {
    await pause(hundred.stop ? STREAM_WATCH_MS : WATCH_MS);
    if (!document.hidden) await look();
  }
}

start().catch((error) => {
  showState(trouble(error));
  showProblem(error);
});
