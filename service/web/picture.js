// Pictures: the ones a person gives (file, drop, paste), and how the network sees them.

import { byId } from "./element.js";

// Calls take(file) for every picture that is picked, dropped or pasted; refuse(why) where there was none.
export function watchPictures(take, refuse) {
  const input = byId("file");
  const shade = byId("dropping");
  const first = (files) =>
    files.length ? take(files[0]) : refuse("There was no picture in it. Save the picture first, then drop the file.");

  input.addEventListener("change", () => {
    if (input.files.length) first(input.files);
    input.value = ""; // so that the same file can be picked again
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    shade.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) shade.hidden = true;
  });
  document.addEventListener("drop", (event) => {
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

// Draws a picture as the server cuts it: around its centre, to the network's size. Returns its own size, or null
// where this browser cannot read it (the server may all the same, or will say why not).
export async function showAsSeen(blob, { width_px: width, height_px: height }) {
  const canvas = byId("seen");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  let picture;
  try {
    picture = await createImageBitmap(blob);
  } catch {
    return null;
  }
  const scale = Math.min(picture.width / width, picture.height / height);
  const [w, h] = [width * scale, height * scale];
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, (picture.width - w) / 2, (picture.height - h) / 2, w, h, 0, 0, width, height);
  const size = { width: picture.width, height: picture.height };
  picture.close();
  return size;
}
