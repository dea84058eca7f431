// Where images leave right now, counted by the server's own metrics: whoever sends them.

const LINE = /^exitserve_exits_total\{([^}]*)\} (\S+)$/gm;
const STARTED = /^process_start_time_seconds (\S+)$/m;
const WINDOW = 300; // answers, at least, once there are so many
const SERVERS = 16; // behind a balancer, or one after the other

export class Traffic {
  constructor(exits) {
    this.exits = exits;
    this.servers = new Map(); // the readings of each, by when it was started: each counts its own answers
  }

  // Takes the text of /metrics.
  read(text) {
    const counts = new Array(this.exits).fill(0);
    for (const [, labels, value] of text.matchAll(LINE)) {
      const exit = Number(/exit="(\d+)"/.exec(labels)?.[1]);
      if (exit >= 1 && exit <= this.exits) counts[exit - 1] += Number(value);
    }
    const now = { counts, total: counts.reduce((sum, n) => sum + n, 0) };
    const server = STARTED.exec(text)?.[1]; // not every system tells
    let seen = this.servers.get(server) ?? [];
    const last = seen.at(-1)?.total;
    if (now.total === last) return; // a page may be open for weeks
    if (now.total < last) seen = []; // the server has restarted
    seen.push(now);
    // The newest reading that is a window old stays as the one to count from; older ones go.
    const enough = seen.findLastIndex((then) => now.total - then.total >= WINDOW);
    if (enough > 0) seen.splice(0, enough);
    this.servers.delete(server); // to the end: who has had nothing new for longest is first, and goes first
    this.servers.set(server, seen);
    if (this.servers.size > SERVERS) this.servers.delete(this.servers.keys().next().value);
  }

  // Another budget: what left under the old one no longer counts.
  restart() {
    for (const seen of this.servers.values()) seen.splice(0, seen.length - 1);
  }

  // How many answers, and their shares by exit: null before there are any.
  get live() {
    const windows = [...this.servers.values()].map((seen) => [seen[0], seen.at(-1)]);
    const answers = windows.reduce((sum, [from, to]) => sum + to.total - from.total, 0);
    const left = (i) => windows.reduce((sum, [from, to]) => sum + to.counts[i] - from.counts[i], 0);
    return { answers, shares: answers ? Array.from({ length: this.exits }, (_, i) => left(i) / answers) : null };
  }
}
