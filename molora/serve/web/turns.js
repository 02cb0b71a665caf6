// The turns of a conversation as they are seen. What a model says is text, whatever it looks like.

import { shown } from "./attachments.js";

/** The turn of a user. */
export function question(text, attachments) {
  const turn = made("li", "user");
  if (attachments.length) {
    const media = made("ul", "media");
    for (const each of attachments) {
      const item = document.createElement("li");
      item.append(shown(each));
      media.append(item);
    }
    turn.append(media);
  }
  if (text) turn.append(made("p", "said", text));
  return turn;
}

/** The turn of the model: `add` texts as they come, and end by `tell`ing of it. */
export function answerTurn() {
  const element = made("li", "assistant");
  const said = made("p", "said");
  element.append(said);
  return {
    element,
    add: (text) => said.append(text),
    tell(about, fault) {
      if (fault) element.append(made("p", "fault", fault));
      const line = told(about);
      if (line.childElementCount) element.append(line);
    },
  };
}

/** The adapters that ran, tokens, seed, and how the answer ended. */
function told({ usage, seed, finished }) {
  const line = made("p", "about");
  if (usage) {
    const { adapters, media_tokens: media, completion_tokens: answered, prompt_tokens: asked } = usage;
    for (const name of adapters) line.append(made("span", "adapter", `adapter ${name}`));
    if (!adapters.length) line.append(made("span", "adapter none", "no adapter"));
    const took = Object.entries(media).map(([modality, tokens]) => `${modality} ${tokens}`);
    const within = took.length ? ` (${took.join(", ")})` : "";
    line.append(made("span", "", `in ${counted(asked)}${within}`), made("span", "", `out ${counted(answered)}`));
  }
  if (seed !== undefined) line.append(made("span", "", `seed ${seed}`));
  const ends = { length: "cut off at the most tokens", stopped: "stopped" };
  if (finished in ends) line.append(made("span", "", ends[finished]));
  return line;
}

function counted(tokens) {
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
}

function made(name, kind, text = "") {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}
