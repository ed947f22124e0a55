// Finds the radiographs in what is chosen or dropped: files, folders and zips.

import { readEntries, readEntry } from "./zip.js";

// Names of texts and tables, and of images, as in image_paths.py and file_names.py of pipeline/data.
export const DESCRIPTION =
  /^(?:.*\.(?:csv|tsv|txt|md|rst|json|xml|ya?ml|xlsx?|docx?|pdf|html?|ini|log|py|ipynb|npy|npz|zip|gz|tar|tgz|bz2|xz|7z|rar|md5|exe|dll|inf)|readme|licen[cs]e|dicomdir|\..*)$/;
export const IMAGE_ENDING =
  /(?<=.)\.(?:jpe?g|jpe|jfif|png|dcm|dicom|ima|tiff?|bmp|gif|webp|jp2|j2k|jpx|jls|hei[cf]|avif|p[gnp]m)$/;
const IMAGE_STARTS = [
  /^\xff\xd8\xff/, /^\x89PNG/, /^GIF8/, /^BM/, /^(?:II[*+]\0|MM\0[*+])/, /^RIFF[^]{4}WEBP/, /^P[1-7]\s/,
  /^(?:\0\0\0\x0cjP {2}|\xff\x4f\xff\x51)/, /^[^]{4}ftyp/, /^[^]{128}DICM/,
];
const IGNORED = /(?:^|\/)(?:Thumbs\.db|desktop\.ini|__MACOSX\/.*)$/; // which file managers write
const NOT_TEXT = /[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]/;
const OTHER_ARCHIVE = /\.(?:tar|tgz|tar\.\w+|7z|rar)$/;

/** What a drop holds: its folders can be read only while the event is handled. */
export function dropped(transfer) {
  return Array.from(transfer.items, (item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
}

/** The files that were chosen, those of a folder in the order in which `cxr predict` reads it. */
export function chosen(files) {
  const key = (file) => file.webkitRelativePath.replaceAll("/", "\0");
  return [...files].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
}

/**
 * Yield the images in files, folders and zips: `name` as `cxr predict` prints it, `size` in bytes, `open()`, which
 * returns a Blob, and `reason`, why it cannot be sent. What is plainly no image in a folder or zip is yielded as null.
 */
export async function* collect(items, maxBytes) {
  for (const item of items) {
    const path = item.webkitRelativePath; // of what is in a chosen folder
    if (item instanceof File) yield* fromFile(item, path || item.name, !path, maxBytes);
    else yield* fromEntry(item, true, maxBytes);
  }
}

async function* fromEntry(entry, isNamed, maxBytes) {
  const name = entry.fullPath.replace(/^\//, "");
  try {
    if (entry.isDirectory) {
      const reader = entry.createReader();
      const children = [];
      for (;;) {
        const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100
        if (!batch.length) break;
        children.push(...batch);
      }
      children.sort((a, b) => (a.name < b.name ? -1 : 1));
      for (const child of children) yield* fromEntry(child, false, maxBytes);
    } else {
      yield* fromFile(await new Promise((resolve, reject) => entry.file(resolve, reject)), name, isNamed, maxBytes);
    }
  } catch {
    yield { name, size: 0, open: null, reason: "cannot be read" };
  }
}

async function* fromFile(file, name, isNamed, maxBytes) {
  const source = { name, size: file.size, open: async () => file };
  if (/\.zip$/i.test(name)) yield* fromZip(file, name, maxBytes);
  else yield* fromImage(source, async (length) => file.slice(0, length), isNamed, maxBytes);
}

async function* fromZip(file, archive, maxBytes) {
  let entries;
  try {
    entries = await readEntries(file);
  } catch (error) {
    yield { name: archive, size: file.size, open: null, reason: describeError(error) };
    return;
  }
  for (const entry of entries) {
    const source = { name: `${archive}/${entry.name}`, size: entry.size, open: () => readEntry(file, entry) };
    yield* fromImage(source, (length) => readEntry(file, entry, length), false, maxBytes);
  }
}

async function* fromImage(source, readStart, isNamed, maxBytes) {
  const base = source.name.slice(source.name.lastIndexOf("/") + 1).toLowerCase();
  if (!isNamed && (base.startsWith(".") || IGNORED.test(source.name))) return;
  let reason = "";
  if (source.size > maxBytes) {
    reason = `too large: ${formatBytes(source.size)}; the server takes ${formatBytes(maxBytes)} at most`;
  }
  if (OTHER_ARCHIVE.test(base)) reason = "an archive; of these only zips are unpacked here";
  else if (!isNamed && !IMAGE_ENDING.test(base) && (await isPlainlyNoImage(base, readStart))) {
    yield null;
    return;
  }
  yield { ...source, reason };
}

/** Whether neither the name nor the content is an image's. */
async function isPlainlyNoImage(base, readStart) {
  try {
    const bytes = new Uint8Array(await (await readStart(4096)).arrayBuffer());
    const text = String.fromCharCode(...bytes);
    if (base !== "dicomdir" && IMAGE_STARTS.some((start) => start.test(text))) return false;
    return DESCRIPTION.test(base) || (text !== "" && !NOT_TEXT.test(text));
  } catch {
    return DESCRIPTION.test(base);
  }
}

export function describeError(error) {
  return error instanceof DOMException ? "cannot be read: it was changed, moved or deleted" : error.message;
}

export function formatBytes(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < 3) [bytes, unit] = [bytes / 1024, unit + 1];
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}
