// The current exit shares of all traffic, from the server's metrics.

const LINE = /^exitserve_exits_total\{([^}]*)\} (\S+)$/gm;
const STARTED = /^process_start_time_seconds (\S+)$/m;
const WINDOW = 300; // answers to average over, at least
const SERVERS = 16; // remembered: behind a balancer, or after restarts

export class Traffic {
  constructor(exits) {
    this.exits = exits;
    this.servers = new Map(); // readings of each server by its start time: each counts its own answers
  }

  // Takes the text of /metrics.
  read(text) {
    const counts = new Array(this.exits).fill(0);
    for (const [, labels, value] of text.matchAll(LINE)) {
      const exit = Number(/exit="(\d+)"/.exec(labels)?.[1]);
      if (exit >= 1 && exit <= this.exits) counts[exit - 1] += Number(value);
    }
    const now = { counts, total: counts.reduce((sum, n) => sum + n, 0) };
    const server = STARTED.exec(text)?.[1]; // not available on every system
    let seen = this.servers.get(server) ?? [];
    const last = seen.at(-1)?.total;
    if (now.total === last) return; // keep no further readings: a page may be open for weeks
    if (now.total < last) seen = []; // the server has restarted
    seen.push(now);
    // Keep the newest reading that is at least a window old, to count from; drop older ones.
    const enough = seen.findLastIndex((then) => now.total - then.total >= WINDOW);
    if (enough > 0) seen.splice(0, enough);
    this.servers.delete(server); // reinserted last, so that the first is the one without news for longest
    this.servers.set(server, seen);
    if (this.servers.size > SERVERS) this.servers.delete(this.servers.keys().next().value);
  }

  // Starts again after a change of the budget.
  restart() {
    for (const seen of this.servers.values()) seen.splice(0, seen.length - 1);
  }

  // Returns the number of answers and their shares by exit; null before the first.
  get live() {
    const windows = [...this.servers.values()].map((seen) => [seen[0], seen.at(-1)]);
    const answers = windows.reduce((sum, [from, to]) => sum + to.total - from.total, 0);
    const left = (i) => windows.reduce((sum, [from, to]) => sum + to.counts[i] - from.counts[i], 0);
    return { answers, shares: answers ? Array.from({ length: this.exits }, (_, i) => left(i) / answers) : null };
  }
}
