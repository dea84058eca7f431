// Where images leave right now, counted by the server's own metrics: whoever sends them.

const LINE = /^exitserve_exits_total\{([^}]*)\} (\S+)$/gm;
const WINDOW = 300; // answers, at least, once there are so many

export class Traffic {
  constructor(exits) {
    this.exits = exits;
    this.seen = [];
  }

  // Takes the text of /metrics.
  read(text) {
    const counts = new Array(this.exits).fill(0);
    for (const [, labels, value] of text.matchAll(LINE)) {
      const exit = Number(/exit="(\d+)"/.exec(labels)?.[1]);
      if (exit >= 1 && exit <= this.exits) counts[exit - 1] += Number(value);
    }
    const now = { counts, total: counts.reduce((sum, n) => sum + n, 0) };
    const last = this.seen.at(-1)?.total;
    if (now.total === last) return; // a page may be open for weeks
    if (now.total < last) this.seen = []; // the server has been started anew
    this.seen.push(now);
    // The newest reading that is a window old stays as the one to count from; older ones go.
    const enough = this.seen.findLastIndex((then) => now.total - then.total >= WINDOW);
    if (enough > 0) this.seen.splice(0, enough);
  }

  // Another budget: what left under the old one no longer counts.
  restart() {
    this.seen.splice(0, this.seen.length - 1);
  }

  // How many answers, and their shares by exit: null before there are any.
  get live() {
    const [from, to] = [this.seen[0], this.seen.at(-1)];
    const answers = from ? to.total - from.total : 0;
    return { answers, shares: answers ? to.counts.map((n, i) => (n - from.counts[i]) / answers) : null };
  }
}
