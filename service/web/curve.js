// The accuracy-cost frontier, with the budget as a point on it that can be dragged. Drawn by uPlot.

import { byId, element } from "./element.js";
import { percent } from "./words.js";

const HEIGHT_PX = 290;
const COST = "average cost, %";
const ROOM_PX = 280; // in a narrower chart, the full label would not fit
const colour = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name);

export class Curve {
  // choose(fraction) is called while the point is dragged, chosen() when it is let go.
  constructor(model, frontier, choose, chosen) {
    this.box = byId("curve");
    const full = model.exits.at(-1).executed_mflops;
    const fixed = model.exits.map((exit) => [(exit.executed_mflops / full) * 100, exit.heldout_accuracy * 100]);
    this.low = Math.min(95, frontier.fraction[0] * 100);
    const line = frontier.fraction.map((fraction, i) => [fraction * 100, frontier.accuracy[i] * 100]);
    const data = globalThis.uPlot.join([transpose(line), transpose(fixed)]);
    this.point = element("span", { class: "point" });
    this.stem = element("span", { class: "stem" });
    this.spent = element("span", { class: "spent", hidden: true }, element("small", {}, "spent"));
    const heights = [...line, ...fixed].map(([, accuracy]) => accuracy);
    const [bottom, top] = [Math.min(...heights), Math.max(...heights)];
    const pad = (top - bottom || 1) * 0.12;
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    this.plot = new globalThis.uPlot(
      {
        width: this.#width(),
        height: HEIGHT_PX,
        legend: { show: false },
        cursor: { show: false },
        padding: [12, 16, 0, 0],
        scales: { x: { time: false, range: [this.low, 100] }, y: { range: [bottom - pad, top + pad] } },
        axes: [
          { ...axis, label: (plot) => (plot.width < ROOM_PX ? COST : `${COST} of the full network`), labelSize: 22, size: 34 },
          { ...axis, label: "images right, %", labelSize: 22, size: 38, incrs: [0.5, 1, 2, 5, 10, 20] },
        ],
        series: [
          {},
          { stroke: colour("--accent"), width: 2.5, spanGaps: true, points: { show: false } },
          {
            stroke: colour("--soft"),
            paths: () => null,
            points: { show: true, size: 8, width: 1.5, stroke: colour("--soft"), fill: colour("--card") },
          },
        ],
        hooks: { ready: [(plot) => plot.over.append(this.stem, this.spent, this.point)], draw: [() => this.#place()] },
      },
      data,
      this.box,
    );
    new ResizeObserver(() => this.plot.setSize({ width: this.#width(), height: HEIGHT_PX })).observe(this.box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plot.redraw());
    this.#drag(choose, chosen);
  }

  #width() {
    return Math.max(240, this.box.clientWidth);
  }

  #drag(choose, chosen) {
    const { over } = this.plot;
    const at = (event) => {
      const { left, width } = over.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - left) / width));
      choose((this.low + share * (100 - this.low)) / 100);
    };
    over.addEventListener("pointerdown", (event) => {
      if (!this.editable || event.button !== 0) return; // other buttons open a menu
      over.setPointerCapture(event.pointerId);
      at(event);
    });
    over.addEventListener("pointermove", (event) => {
      if (over.hasPointerCapture(event.pointerId)) at(event);
    });
    over.addEventListener("pointerup", () => this.editable && chosen());
  }

  // The budget, its point on the frontier, and the measured spending, as fractions of the full network.
  show({ fraction, expectedFraction, accuracy, spentFraction, editable }) {
    Object.assign(this, { fraction, expectedFraction, accuracy, spentFraction, editable });
    this.box.classList.toggle("editable", editable);
    this.box.setAttribute(
      "aria-label",
      `Accuracy against average cost. A budget of ${percent(fraction)} of the full network is expected to spend ` +
        `${percent(expectedFraction)} and to be right for ${percent(accuracy, 1)} of the images.`,
    );
    this.#place();
  }

  #place() {
    const { plot } = this;
    if (!plot || this.fraction === undefined) return;
    const x = (fraction) => `${plot.valToPos(Math.max(fraction * 100, this.low), "x")}px`;
    this.stem.style.left = x(this.fraction);
    this.point.style.left = x(this.expectedFraction);
    this.point.style.top = `${plot.valToPos(this.accuracy * 100, "y")}px`;
    this.spent.hidden = this.spentFraction == null;
    if (!this.spent.hidden) {
      this.spent.style.left = x(Math.min(1, this.spentFraction));
      this.spent.classList.toggle("far", this.spentFraction > 0.9); // its label would not fit
    }
    // Aligns the slider below with the chart's axis.
    const slider = byId("slider").style;
    slider.setProperty("--from", `${plot.over.offsetLeft}px`);
    slider.setProperty("--width", `${plot.over.offsetWidth}px`);
  }
}

const transpose = (rows) => [rows.map(([x]) => x), rows.map(([, y]) => y)];
