// The dialog that asks for the server's key.

import { whenKeyIsNeeded } from "./server.js";

const why = made("p", { className: "note" });
const field = made("input", { name: "key", type: "password", autocomplete: "off", required: true });
const title = made("h2", { id: "key-title" }, "API key");
const use = made("button", { value: "use", className: "main" }, "Use it");
const form = made("form", { method: "dialog" }, title, why, made("label", {}, "Key ", field));
form.append(
  made("p", { className: "note" }, "The key stays in this page until it is closed."),
  made("p", { className: "buttons" }, use),
);
const dialog = made("dialog", {}, form);
dialog.setAttribute("aria-labelledby", title.id);
document.body.append(dialog);

whenKeyIsNeeded(async (refused) => {
  why.textContent = refused ? "The server does not know this key." : "This server answers those who have a key.";
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "use" ? field.value : null;
});

function made(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}
