// Pictures: given by the user (file, drop, paste), and as the network sees them.

import { byId } from "./element.js";

// Calls take(file) for every picture that is picked, dropped or pasted; refuse(why) if there was no picture in it.
export function watchPictures(take, refuse) {
  const input = byId("file");
  const shade = byId("dropping");
  const first = (files) =>
    files.length ? take(files[0]) : refuse("There was no picture in it. Save the picture first, then drop the file.");

  input.addEventListener("change", () => {
    if (input.files.length) first(input.files);
    input.value = ""; // so that the same file can be picked again
  });
  // Ignore dragged text, which may go into a field.
  const mayHold = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");
  document.addEventListener("dragover", (event) => {
    if (!mayHold(event)) return;
    event.preventDefault();
    shade.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) shade.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    if (!mayHold(event)) return;
    event.preventDefault();
    shade.hidden = true;
    first(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData.files;
    if (files.length) first(files);
    else if (!event.target.matches?.("input")) refuse("The clipboard holds no picture.");
  });
}

// Reads a file before it is sent: sending an unreadable file fails with the same error as a lost connection.
export async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
    return file;
  } catch {
    const why = "It is a folder, or this browser may not read it: choose one picture.";
    throw Object.assign(new Error(why), { title: "The file cannot be read" });
  }
}

// Draws a picture cropped as the server does it: around its centre, to the network's size; clears if there is none.
export function showAsSeen(picture, { width_px: width, height_px: height }) {
  const canvas = byId("seen");
  Object.assign(canvas, { width, height });
  if (!picture) return;
  const context = canvas.getContext("2d");
  const scale = Math.min(picture.width / width, picture.height / height);
  const [w, h] = [width * scale, height * scale];
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, (picture.width - w) / 2, (picture.height - h) / 2, w, h, 0, 0, width, height);
}

// A browser reads more than the server accepts: larger pictures, other formats, the first frame of an animation.
const REFUSED = {
  "not-an-image": "is of a kind that the server does not read",
  "animated-image": "is animated",
  "image-too-large": "has more pixels than the server takes",
  "body-too-large": "is larger than the server takes",
};
const SLOW_BYTES = 1 << 20; // below this, a copy is hardly smaller

export const whyNot = ({ kind }) => REFUSED[kind] ?? "takes too long to send";
export const mayBeCopied = ({ kind }, file) =>
  kind in REFUSED || (["body-too-slow", "silent"].includes(kind) && file.size > SLOW_BYTES);

const COPY_PX = 512; // shorter side of the copy, at least twice the network's size
const LONGEST_PX = 4096;

// Makes a smaller JPEG of a picture that this browser can read.
export async function copyOf(picture, seen) {
  const [short, long] = [picture.width, picture.height].sort((a, b) => a - b);
  const enough = Math.max(COPY_PX, 2 * seen.width_px, 2 * seen.height_px);
  const scale = Math.min(1, enough / short, LONGEST_PX / long);
  const canvas = document.createElement("canvas");
  const scaled = (side) => Math.max(1, Math.round(side * scale));
  const sides = { width: scaled(picture.width), height: scaled(picture.height) };
  const context = Object.assign(canvas, sides).getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // the server blends transparent pixels with white, too
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
  return { blob, size: `${canvas.width} × ${canvas.height}` };
}
