// Makes elements: element("p", {class: "note"}, "text", child). Text is always text, never markup.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

// A position from 0 (first exit, cheapest) to 1 (last exit, most expensive); style.css maps it to a colour.
export const tint = (exit, exits) => (exits > 1 ? (exit - 1) / (exits - 1) : 0).toFixed(3);

export const badge = (exit, exits) =>
  element("span", { class: "badge tinted", "--t": tint(exit, exits) }, String(exit));

// The text of an error for the user.
export const problem = ({ title = "This page failed", message }) =>
  element("p", { class: "problem" }, element("b", {}, title), ". ", message);

// Sets the text of a live region if it differs: screen readers read the same text again when it is set again.
export function say(place, ...parts) {
  const text = parts.map((part) => part.textContent ?? part).join("");
  if (place.textContent !== text) place.replaceChildren(...parts);
}

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
