// Formats numbers and reasons for the user.

const fixed = (number, digits) => number.toFixed(digits).replace(/^-(?=[0.]+$)/, ""); // no "-0"
export const percent = (share, digits = 0) => `${fixed(share * 100, digits)} %`;
export const millions = (mflops) => {
  const digits = mflops < 0.1 ? 4 : mflops < 1 ? 2 : mflops < 1000 ? 1 : 0;
  return `${mflops.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })} M`;
};
export const className = (label) => label.replaceAll("_", " ");
export const score = (value) => (Number.isFinite(value) ? fixed(value, 2) : "none");
export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

// Formats a threshold; null means that every image leaves, or none: whether any image leaves there tells which.
export const needs = (threshold, takesAll) =>
  Number.isFinite(threshold) ? score(threshold) : takesAll ? "any" : "none will do";

// The current effect of a latency target on the budget.
export function aboutLatency({ target_ms: target, p95_ms: p95, limited, limited_since: since, at_lowest: lowest, working }) {
  const aim = `95 of 100 pictures should be answered within ${target} ms`;
  const now = p95 === null ? "" : ` (now: ${Math.round(p95)} ms)`;
  if (!limited) return `${aim}${now}. At present this budget is fast enough.`;
  const from = new Date(since).toLocaleTimeString("en", { hour12: false });
  const most = lowest ? ", the lowest it can go: further load is refused" : "";
  return (
    `${aim}${now}. At this budget the load would take longer, so since ${from} the server has gone below it: ` +
    `it works at ${percent(working.fraction)} of the full network, with ${percent(working.accuracy, 1)} expected to be right${most}.`
  );
}

const SCORES = {
  logit_margin: "The score says how far the best guess is ahead of the next one.",
  probability_margin:
    "The score says how much more probable the best guess is than the next one, less one: 0 is certain, -1 undecided.",
  max_softmax: "The score says how far the best guess is ahead of all others together.",
};

export const aboutScore = (name) => SCORES[name] ?? "The score says how sure the exit is of its best guess.";

const REASONS = {
  confident: (answer) => {
    const unused = answer.exits - answer.exit;
    const spared = unused ? ` ${unused === 1 ? "The last stage was" : `The other ${unused} stages were`} never run.` : "";
    return `Exit ${answer.exit} was sure enough: its score of ${score(answer.score)} ${reached(answer)}.${spared}`;
  },
  final: () =>
    "No exit was sure enough, so it went through the whole network. The last exit answers whatever its score.",
  budget: (answer) =>
    `Exit ${answer.exit} was not sure enough, but no compute was left for going on: hard images have just used up ` +
    "what easy ones had saved. It got the best answer so far, and the average is kept.",
  deadline: (answer) => `The request's time was up after exit ${answer.exit}, so it got the best answer so far.`,
  pinned: (answer) => `The request asked for exit ${answer.exit}.`,
};

const reached = ({ threshold }) =>
  Number.isFinite(threshold) ? `reached the threshold of ${score(threshold)}` : "is enough, as any would be at this budget";

export const whyItLeft = (answer) => REASONS[answer.reason]?.(answer) ?? `Reason: ${answer.reason}.`;
