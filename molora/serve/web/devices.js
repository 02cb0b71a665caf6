// Camera and microphone.

import { wav } from "./attachments.js";

/** A picture that the user takes in `dialog`, or null. Throws an Error in words for the user. */
export async function takePicture(dialog) {
  const [video, take] = [dialog.querySelector("video"), dialog.querySelector("[value=take]")];
  const choice = dialog.querySelector("select");
  let stream = await opened("camera", { video: { facingMode: "environment" } });
  const show = () => (video.srcObject = stream);
  const end = () => stream.getTracks().forEach((track) => track.stop());
  const cameras = (await navigator.mediaDevices.enumerateDevices()).filter(({ kind }) => kind === "videoinput");
  choice.replaceChildren(...cameras.map(({ deviceId, label }, i) => new Option(label || `Camera ${i + 1}`, deviceId)));
  choice.value = stream.getVideoTracks()[0].getSettings().deviceId;
  choice.parentElement.hidden = cameras.length < 2;
  choice.onchange = async () => {
    take.disabled = true;
    end();
    stream = await opened("camera", { video: { deviceId: { exact: choice.value } } });
    show();
  };
  video.onplaying = () => (take.disabled = false);
  take.disabled = true;
  let picture = null;
  dialog.querySelector("form").onsubmit = ({ submitter }) => {
    if (submitter !== take) return;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d").drawImage(video, 0, 0);
    picture = new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  };
  show();
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  end();
  video.srcObject = null;
  const blob = await picture;
  return blob && new File([blob], "camera picture.jpg", { type: blob.type });
}

/** A recording that has begun: `seconds()` of it so far, and `end()`, which gives the sound. `ended` is called where the
 * microphone ends it. Throws an Error in words for the user. */
export async function record(ended) {
  const stream = await opened("microphone", { audio: true });
  const context = new AudioContext();
  await context.audioWorklet.addModule("web/recorder.js");
  const [source, recorder] = [context.createMediaStreamSource(stream), new AudioWorkletNode(context, "recorder")];
  const blocks = [];
  recorder.port.onmessage = ({ data }) => blocks.push(data);
  source.connect(recorder);
  const count = () => blocks.reduce((sum, block) => sum + block.length, 0);
  stream.getAudioTracks()[0].onended = ended;
  return {
    seconds: () => count() / context.sampleRate,
    async end() {
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      const samples = new Float32Array(count());
      let place = 0;
      for (const block of blocks) {
        samples.set(block, place);
        place += block.length;
      }
      return wav(samples, context.sampleRate, "recording.wav");
    },
  };
}

async function opened(device, wanted) {
  if (!navigator.mediaDevices) {
    throw new Error(`The browser gives the ${device} only to pages of this machine (127.0.0.1) or with https.`);
  }
  try {
    return await navigator.mediaDevices.getUserMedia(wanted);
  } catch (error) {
    const why = {
      NotAllowedError: `The browser was not allowed to use the ${device}.`,
      NotFoundError: `There is no ${device}.`,
      NotReadableError: `Another program uses the ${device}.`,
    };
    throw new Error(why[error.name] ?? `The ${device} cannot be used: ${error.message}`);
  }
}
