// The chat: what is drafted, sent, answered and remembered. All of it is in this page, and gone with it.

import "./key.js";
import { fromContent, fromFile, fromPart, shown } from "./attachments.js";
import { record, takePicture } from "./devices.js";
import { answer, examples, models } from "./server.js";
import { answerTurn, question } from "./turns.js";

const $ = (id) => document.getElementById(id);
const fields = (id) => $(id).querySelector("form").elements;

let known = []; // the model's names
let offered = { questions: [], parts: {} }; // examples: of questions, and of parts of modalities' own
let conversation = []; // messages as the server reads them
let draft = []; // attachments of the next message
let answering = null; // the AbortController of the answer that comes
let recording = null; // a promise of it

const takes = () => known.find(({ id }) => id === fields("settings").model.value)?.parts ?? [];

// What is drafted.

function attach(...attachments) {
  draft.push(...attachments);
  showDraft();
}

function showDraft() {
  $("media").replaceChildren(
    ...draft.map((each) => {
      const [item, remove] = [document.createElement("li"), document.createElement("button")];
      item.className = each.kind;
      remove.type = "button";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `Remove ${each.name}`);
      remove.onclick = () => {
        draft = draft.filter((other) => other !== each);
        showDraft();
        $("text").focus();
      };
      item.append(shown(each), remove);
      return item;
    }),
  );
}

/** Does what may fail, and shows how it failed. */
async function tried(work) {
  $("error").textContent = "";
  try {
    return await work();
  } catch (error) {
    $("error").textContent = error.message;
  }
}

const attachFiles = (files) =>
  tried(async () => {
    await ready;
    for (const file of files) attach(await fromFile(file, takes()));
  });

async function startRecording() {
  recording = record(() => tried(endRecording));
  try {
    const { seconds } = await recording;
    const timer = setInterval(() => recording ? showSeconds(seconds()) : clearInterval(timer), 250);
    showSeconds(0);
  } catch (error) {
    recording = null;
    throw error;
  }
}

function showSeconds(seconds) {
  const time = `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
  $("record").setAttribute("aria-pressed", "true");
  $("record").querySelector("span").textContent = `Stop ${time}`;
}

async function endRecording() {
  const ended = recording;
  recording = null;
  $("record").setAttribute("aria-pressed", "false");
  $("record").querySelector("span").textContent = "Record";
  attach(await fromFile(await (await ended).end(), takes()));
}

// What is sent, and answered.

async function send() {
  if (answering) return;
  answering = new AbortController();
  showAnswering();
  await ready;
  await tried(async () => {
    if (recording) await endRecording();
    await exchange(answering.signal);
  });
  answering = null;
  showAnswering();
}

function showAnswering() {
  const [shown, other] = answering ? [$("stop"), $("send")] : [$("send"), $("stop")];
  const focused = document.activeElement === other;
  shown.hidden = false;
  other.hidden = true;
  if (focused) shown.focus();
}

/** Sends the draft. If nothing comes of it, it is a draft again. Throws the server's error then. */
async function exchange(signal) {
  const [chat, text, attachments] = [conversation, $("text").value.trim(), draft];
  if (!text && !attachments.length) return;
  const parts = attachments.map(({ part }) => part);
  const content = parts.length ? [...parts, ...(text ? [{ type: "text", text }] : [])] : text;
  const message = { role: "user", content };
  const [asked, turn] = [question(text, attachments), answerTurn()];
  setDraft("", []);
  $("welcome").hidden = true;
  $("turns").append(asked, turn.element);
  $("main").scrollTop = $("main").scrollHeight;
  $("status").textContent = "The model answers.";
  const about = {};
  let said = "";
  let failure = null;
  try {
    for await (const chunk of answer({ ...settings(), messages: [...chat, message] }, signal)) {
      about.usage = chunk.usage ?? about.usage;
      about.seed = chunk.molora?.seed ?? about.seed;
      about.finished = chunk.choices[0]?.finish_reason ?? about.finished;
      const piece = chunk.choices[0]?.delta.content ?? "";
      said += piece;
      followed(() => turn.add(piece));
    }
  } catch (error) {
    failure = error;
  }
  if (chat !== conversation) return; // another chat has begun
  const stopped = signal.aborted;
  if (failure && !said) {
    asked.remove();
    turn.element.remove();
    $("welcome").hidden = chat.length > 0;
    setDraft([text, $("text").value].filter(Boolean).join("\n"), [...attachments, ...draft]);
    $("status").textContent = "";
    if (!stopped) throw failure;
    return;
  }
  if (stopped) about.finished = "stopped";
  followed(() => turn.tell(about, stopped ? "" : failure?.message));
  chat.push(message, { role: "assistant", content: said });
  $("status").textContent = `Answer: ${said}`;
}

function setDraft(text, attachments) {
  $("text").value = text;
  draft = attachments;
  showDraft();
}

/** Changes the conversation, and stays at its end if that was seen. */
function followed(change) {
  const main = $("main");
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 40;
  change();
  if (atEnd) main.scrollTop = main.scrollHeight;
}

function settings() {
  const given = fields("settings");
  const numbers = ["temperature", "max_tokens", "seed"].filter((name) => given[name].value !== "");
  return { model: given.model.value, ...Object.fromEntries(numbers.map((name) => [name, given[name].valueAsNumber])) };
}

// What the model takes.

function showWhatItTakes() {
  const words = { image: "pictures", audio: "sounds" };
  const others = takes().filter((type) => !(type in words));
  const types = [...Object.keys(words).filter((type) => takes().includes(type)), ...others];
  $("model").textContent = fields("settings").model.value;
  $("takes").textContent = `Ask in ${listed(["text", ...types.map((type) => words[type] ?? type)])}`;
  for (const id of ["add-picture", "open-camera"]) $(id).hidden = !types.includes("image");
  for (const id of ["add-sound", "record"]) $(id).hidden = !types.includes("audio");
  $("open-part").hidden = !others.length;
  fields("part").kind.replaceChildren(...others.map((type) => new Option(type)));
  $("examples").replaceChildren(...offered.questions.filter(fits).map(card));
  $("examples").hidden = !$("examples").childElementCount;
}

function fits({ attachments }) {
  const types = { picture: "image", sound: "audio" };
  return attachments.every(({ kind, name }) => takes().includes(types[kind] ?? name));
}

/** An example to look at, which becomes the draft when it is chosen. */
function card({ text, attachments }) {
  const [item, choose] = [document.createElement("li"), document.createElement("button")];
  choose.type = "button";
  choose.onclick = () => {
    setDraft(text, attachments);
    $("text").focus();
  };
  const picture = attachments.find(({ kind }) => kind === "picture");
  if (picture) choose.append(shown({ ...picture, name: "" }));
  const media = attachments.filter((each) => !text || each !== picture);
  const named = listed(media.map(({ kind, name }) => (kind === "part" ? name : `a ${kind}`)));
  choose.append(text && named ? `${text} (with ${named})` : text || named);
  item.append(choose);
  return item;
}

function listed(words) {
  return new Intl.ListFormat("en", { type: "conjunction" }).format(words);
}

// What the user does.

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("stop").onclick = () => answering?.abort();
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
document.onkeydown = ({ key }) => {
  if (key === "Escape" && !document.querySelector("dialog[open]")) answering?.abort();
};
$("new").onclick = () => {
  answering?.abort();
  conversation = [];
  $("turns").replaceChildren();
  setDraft("", []);
  $("error").textContent = $("status").textContent = "";
  $("welcome").hidden = false;
  $("text").focus();
};

for (const [button, input] of [
  ["add-picture", "picture-files"],
  ["add-sound", "sound-files"],
]) {
  $(button).onclick = () => $(input).click();
  $(input).onchange = async () => {
    await attachFiles([...$(input).files]);
    $(input).value = ""; // so that the same file can be chosen again
    $("text").focus();
  };
}
$("open-camera").onclick = () =>
  tried(async () => {
    const picture = await takePicture($("camera"));
    if (picture) attach(await fromFile(picture, takes()));
    $("text").focus();
  });
$("record").onclick = () => tried(recording ? endRecording : startRecording);
$("open-part").onclick = () => {
  const given = fields("part");
  given.kind.onchange = () => {
    const type = given.kind.value;
    given.json.value = JSON.stringify(offered.parts[type] ?? { type, [type]: null }, null, 2);
  };
  given.kind.onchange();
  $("part").showModal();
};
$("part").querySelector("form").onsubmit = (event) => {
  if (event.submitter.value !== "add") return;
  const { json } = fields("part");
  try {
    attach(fromPart(JSON.parse(json.value)));
  } catch (error) {
    event.preventDefault();
    json.setCustomValidity(error.message);
    json.reportValidity();
  }
};
fields("part").json.oninput = ({ target }) => target.setCustomValidity("");

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attachFiles(files);
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
for (const end of ["drop", "dragleave"]) {
  document.addEventListener(end, (event) => {
    document.body.classList.remove("dropping");
    if (end === "dragleave" || !event.dataTransfer.files.length) return;
    event.preventDefault();
    attachFiles([...event.dataTransfer.files]);
  });
}

$("open-settings").onclick = () => $("settings").showModal();
fields("settings").model.onchange = showWhatItTakes;

const ready = tried(async () => {
  known = await models();
  const given = await examples();
  offered = { questions: given.examples.map(fromContent), parts: given.parts };
  fields("settings").model.replaceChildren(...known.map(({ id }) => new Option(id)));
  showWhatItTakes();
});
