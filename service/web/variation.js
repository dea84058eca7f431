// Varies a picture for section 3: mirrored and shifted as training images are, with slight changes of brightness and
// noise, so that no two are the same.

const SHIFT = 0.1; // at most, of its width and height; the gap shows its edge
const LIGHTER = 0.06;
const NOISE = 2; // standard deviation, in levels of 256

const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const upTo = (limit) => (2 * Math.random() - 1) * limit;

// Returns a canvas of the picture's size.
export function vary(picture) {
  const canvas = document.createElement("canvas");
  const { width, height } = Object.assign(canvas, { width: picture.width, height: picture.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  // By whole pixels: resampling would blur a picture this small too much.
  const [dx, dy] = [Math.round(upTo(SHIFT * width)), Math.round(upTo(SHIFT * height))];
  if (Math.random() < 0.5) context.setTransform(-1, 0, 0, 1, width, 0);
  context.drawImage(picture, 0, 0); // fills the gap of the shift
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
