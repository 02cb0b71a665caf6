// What is attached to a message: the part that the server reads, and an element that shows it.

// Recordings of phones and browsers, which the browser decodes, as the server does not.
const DECODED_HERE = /^(audio|video)\/(mp4|x-m4a|m4a|aac|webm|3gpp)|\.(m4a|mp4|aac|webm|3gp)$/;
const OF_PARTS = { image: "picture", audio: "sound" };

/** A picture or a sound. Throws an Error, in words for the user, for a file that is neither or that `takes` lacks. */
export async function fromFile(file, takes) {
  const type = file.type.split("/")[0];
  const kind = type === "video" && DECODED_HERE.test(file.type) ? "audio" : type;
  if (!(kind in OF_PARTS)) throw new Error(`${file.name} is neither a picture nor a sound.`);
  if (!takes.includes(kind)) throw new Error(`${file.name}: this model takes no ${OF_PARTS[kind]}s.`);
  const blob = kind === "audio" && DECODED_HERE.test(file.type || file.name) ? await decoded(file) : file;
  const url = await dataUrl(blob);
  const part =
    kind === "image"
      ? { type: "image_url", image_url: { url } }
      : { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1) } };
  return { kind: OF_PARTS[kind], name: file.name, part, url: URL.createObjectURL(blob) };
}

/** A part as the server reads it. */
export function fromPart(part) {
  const data = part.image_url?.url.replace(/^data:[^,]*,/, "") ?? part.input_audio?.data;
  if (data === undefined) return { kind: "part", name: part.type, part };
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  const kind = part.image_url ? "picture" : "sound";
  return { kind, name: `example ${kind}`, part, url: URL.createObjectURL(new Blob([bytes])) };
}

/** The text and the attachments of a message whose content is given as the server reads it. */
export function fromContent(content) {
  const text = content.filter(({ type }) => type === "text").map((part) => part.text);
  const media = content.filter(({ type }) => type !== "text");
  return { text: text.join("\n"), attachments: media.map(fromPart) };
}

/** An element that shows an attachment. */
export function shown({ kind, name, part, url }) {
  const element = document.createElement({ picture: "img", sound: "audio", part: "pre" }[kind]);
  if (kind === "part") {
    element.textContent = JSON.stringify(part);
    element.tabIndex = 0;
    return element;
  }
  element.src = url;
  if (kind === "picture") element.alt = name;
  else {
    element.controls = true;
    element.setAttribute("aria-label", name);
  }
  return element;
}

/** A WAV file of samples between -1 and 1. */
export function wav(samples, rateHz, name) {
  const header = new DataView(new ArrayBuffer(44));
  const words = (offset, text) => [...text].forEach((each, i) => header.setUint8(offset + i, each.charCodeAt(0)));
  words(0, "RIFF");
  header.setUint32(4, 36 + 2 * samples.length, true);
  words(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // integers
  header.setUint16(22, 1, true); // one channel
  header.setUint32(24, rateHz, true);
  header.setUint32(28, 2 * rateHz, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  words(36, "data");
  header.setUint32(40, 2 * samples.length, true);
  const integers = Int16Array.from(samples, (each) => Math.round(32767 * Math.max(-1, Math.min(1, each))));
  return new File([header, integers], name, { type: "audio/wav" });
}

async function decoded(file) {
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, 48000).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} cannot be decoded here. Convert it to WAV, MP3, FLAC or Ogg.`);
  }
  const mixed = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((each, i) => (mixed[i] += each / sound.numberOfChannels));
  }
  return wav(mixed, sound.sampleRate, file.name);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${blob.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(blob);
  });
}
