// The dialog that asks for the server's key.

import { whenKeyIsNeeded } from "./server.js";

const dialog = document.getElementById("ask-key");
const field = dialog.querySelector("input");

whenKeyIsNeeded(async (why) => {
  document.getElementById("key-why").textContent = why;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "use" ? field.value : null;
});
