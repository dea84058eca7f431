// A picture like a given one, but not the same: what section 3 sends. Changed as training images are (mirrored, shifted),
// and mildly in light and noise, so that no two are the same.

const SHIFT = 0.1; // of its width and height, at most; its edge fills the gap
const LIGHTER = 0.06;
const NOISE = 2; // standard deviation, in levels of 256

const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const upTo = (limit) => (2 * Math.random() - 1) * limit;

// Returns a canvas of the picture's own size.
export function vary(picture) {
  const canvas = document.createElement("canvas");
  const { width, height } = Object.assign(canvas, { width: picture.width, height: picture.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  // Whole pixels: a picture this small loses too much when it is resampled.
  const [dx, dy] = [Math.round(upTo(SHIFT * width)), Math.round(upTo(SHIFT * height))];
  if (Math.random() < 0.5) context.setTransform(-1, 0, 0, 1, width, 0);
  context.drawImage(picture, 0, 0); // what the shift lays bare shows this
  context.drawImage(picture, dx, dy);
  const pixels = context.getImageData(0, 0, width, height);
  const light = 1 + upTo(LIGHTER);
  for (let i = 0; i < pixels.data.length; i++) {
    if (i % 4 < 3) pixels.data[i] = pixels.data[i] * light + NOISE * normal();
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

export const toBlob = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
