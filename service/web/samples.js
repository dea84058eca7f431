// The pictures that ship with the page: samples/NAME.png, by what they show. Their source: samples/README.md.

import { readFile } from "./server.js";

export const SAMPLES = ["bicycle", "keyboard", "lion", "orange", "maple_tree", "snail", "streetcar", "fox", "couch"];

export const sampleUrl = (name) => new URL(`samples/${name}.png`, import.meta.url);

export const sampleBlob = (name) => readFile(sampleUrl(name));
