// The pictures that come with the page: samples/NAME.png, named after what they show; samples/README.md says whence.

import { readFile } from "./server.js";

export const SAMPLES = ["bicycle", "keyboard", "lion", "orange", "maple_tree", "snail", "streetcar", "fox", "couch"];

export const sampleUrl = (name) => new URL(`samples/${name}.png`, import.meta.url);

export const sampleBlob = (name) => readFile(sampleUrl(name));
