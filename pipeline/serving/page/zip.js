// Reads zips entry by entry from the disk: neither the archive nor more than one entry at a time is in memory.

const END = 0x06054b50; // signatures of the zip's records
const END64_LOCATOR = 0x07064b50;
const END64 = 0x06064b50;
const ENTRY = 0x02014b50;
const LOCAL = 0x04034b50;
const MAX_DIRECTORY_BYTES = 2 ** 26; // about half a million entries
const UNKNOWN = 0xffffffff; // the value is in the zip64 field
const CP437 =
  "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0";
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

async function read(file, start, length) {
  if (start < 0 || start + length > file.size) throw new Error("broken zip: it ends too early");
  return new DataView(await file.slice(start, start + length).arrayBuffer());
}

/** The entries of a zip, from its directory; folders are left out. Throws an error with the reason. */
export async function readEntries(file) {
  const { start, size, shift } = await findDirectory(file);
  if (size > MAX_DIRECTORY_BYTES) throw new Error("too many files in the zip");
  const view = await read(file, start, size);
  const entries = [];
  for (let position = 0; position + 46 <= size; ) {
    if (view.getUint32(position, true) !== ENTRY) throw new Error("broken zip: no directory where it should be");
    const [nameLength, extraLength, commentLength] = [28, 30, 32].map((at) => view.getUint16(position + at, true));
    const extra = position + 46 + nameLength;
    if (extra + extraLength > size) throw new Error("broken zip: it ends too early");
    const sizes = readSizes(view, position, extra, extraLength);
    const entry = {
      name: decodeName(new Uint8Array(view.buffer, position + 46, nameLength)),
      isEncrypted: (view.getUint16(position + 8, true) & 1) === 1,
      method: view.getUint16(position + 10, true),
      crc: view.getUint32(position + 16, true),
      size: sizes[0],
      compressedSize: sizes[1],
      offset: sizes[2] + shift,
    };
    if (!entry.name.endsWith("/")) entries.push(entry);
    position = extra + extraLength + commentLength;
  }
  return entries;
}

async function findDirectory(file) {
  const tailStart = Math.max(0, file.size - 22 - 65535); // the end record, and a comment
  const tail = await read(file, tailStart, file.size - tailStart);
  let at = tail.byteLength - 22;
  while (at >= 0 && tail.getUint32(at, true) !== END) at--;
  if (at < 0) throw new Error("broken zip: no directory at its end");
  let end = tailStart + at;
  let [size, offset] = [tail.getUint32(at + 12, true), tail.getUint32(at + 16, true)];
  const locator = end >= 20 ? await read(file, end - 20, 20) : null;
  if (locator?.getUint32(0, true) === END64_LOCATOR) {
    end = Number(locator.getBigUint64(8, true));
    const record = await read(file, end, 56);
    if (record.getUint32(0, true) !== END64) throw new Error("broken zip: no directory at its end");
    [size, offset] = [40, 48].map((field) => Number(record.getBigUint64(field, true)));
  }
  const start = end - size; // offsets count from the start of the zip, which may have other data in front
  return { start, size, shift: start - offset };
}

/** Size, compressed size and offset of an entry; those that do not fit 32 bits are in an extra field. */
function readSizes(view, position, extra, extraLength) {
  const values = [24, 20, 42].map((at) => view.getUint32(position + at, true));
  for (let at = extra; at + 4 <= extra + extraLength; at += 4 + view.getUint16(at + 2, true)) {
    if (view.getUint16(at, true) !== 1) continue;
    let field = at + 4;
    for (const [index, value] of values.entries()) {
      if (value !== UNKNOWN || field + 8 > extra + extraLength) continue;
      values[index] = Number(view.getBigUint64(field, true));
      field += 8;
    }
  }
  return values;
}

/** Names are UTF-8, whether the zip says so or not, or else of the old code page; Windows may write backslashes. */
function decodeName(bytes) {
  let name;
  try {
    name = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    name = Array.from(bytes, (byte) => (byte < 128 ? String.fromCharCode(byte) : CP437[byte - 128])).join("");
  }
  return name.replaceAll("\\", "/").replace(/^\.\//, "");
}

/** The content of an entry, or its first `start` bytes. Throws an error with the reason. */
export async function readEntry(file, entry, start = Infinity) {
  if (entry.isEncrypted) throw new Error("encrypted in the zip");
  if (entry.method !== 0 && entry.method !== 8) throw new Error(`unsupported compression in the zip: method ${entry.method}`);
  const header = await read(file, entry.offset, 30);
  if (header.getUint32(0, true) !== LOCAL) throw new Error("broken zip: the file is not where it should be");
  const data = entry.offset + 30 + header.getUint16(26, true) + header.getUint16(28, true);
  let stream = file.slice(data, data + entry.compressedSize).stream();
  if (entry.method === 8) stream = stream.pipeThrough(new DecompressionStream("deflate-raw"));
  const reader = stream.getReader();
  const chunks = [];
  let [length, crc] = [0, -1];
  try {
    while (length <= entry.size) {
      const { done, value } = await reader.read();
      if (done) break;
      length += value.length;
      chunks.push(value);
      if (length >= start) return new Blob(chunks).slice(0, start);
      for (const byte of value) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
    }
  } catch (error) {
    if (error.name === "NotReadableError") throw error;
    throw new Error("broken in the zip: it cannot be decompressed");
  } finally {
    reader.cancel().catch(() => {}); // it may be longer than it says, and not end
  }
  if (length !== entry.size || ~crc >>> 0 !== entry.crc) throw new Error("broken in the zip: wrong size or checksum");
  return new Blob(chunks);
}
