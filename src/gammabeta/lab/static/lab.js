// The page as a whole: which bench is open, how the lab stands, light and dark.
import { byId, connect, connected, keepInAddress, on, percent, readAddress } from "./core.js";
import { redrawAll } from "./charts.js";
import { setUpDrawing } from "./draw.js";
import { setUpRace } from "./race.js";
import { setUpChannel } from "./channel.js";
import { setUpMates } from "./mates.js";
import { setUpBreaking } from "./break.js";
import { setUpFolding } from "./fold.js";

const benches = {
  draw: setUpDrawing(),
  race: setUpRace(),
  channel: setUpChannel(),
  mates: setUpMates(),
  break: setUpBreaking(),
  fold: setUpFolding(),
};
const OWN = ["race", "break"]; // these train networks of their own and need not wait for the first one
const started = new Set(); // on this connection
let ready = false;
let current = readAddress(() => keepInAddress(current));
if (!Object.hasOwn(benches, current)) current = "draw";

function open(bench) {
  if (bench !== current) benches[current].leave?.();
  current = bench;
  for (const section of document.querySelectorAll("[data-section]")) section.hidden = section.dataset.section !== bench;
  for (const link of document.querySelectorAll("[data-bench]")) {
    if (link.dataset.bench === bench) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  keepInAddress(bench);
  redrawAll();
  if (connected() && (ready || OWN.includes(bench)) && !started.has(bench)) {
    started.add(bench);
    benches[bench].start();
  }
}

for (const link of document.querySelectorAll("[data-bench]")) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // in another tab
    event.preventDefault();
    open(link.dataset.bench);
    byId("main").focus({ preventScroll: true });
  });
}

on("lab", (state) => {
  byId("error").hidden = true;
  byId("state-text").textContent = state.text;
  byId("state-bar").value = state.share;
  byId("state-bar").hidden = state.stage === "failed" || state.stage === "ready";
  if (state.stage === "ready") {
    const trained = state.seconds ? `: trained in ${state.seconds.toFixed(1)} s, the network names ${percent(state.accuracy)} of the test images right` : "";
    byId("state-text").textContent = `Ready${trained}.`;
    ready = true;
    document.documentElement.dataset.trained = state.seconds ?? "";
    document.documentElement.dataset.ready = "yes";
  }
  open(current);
});

on("error", (message) => {
  byId("error").textContent = message.text;
  byId("error").hidden = false;
  benches[message.bench]?.failed?.();
});

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId(button.dataset.copy).textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy as Python"), 2000);
  });
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  redrawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
new ResizeObserver(redrawAll).observe(document.body);
addEventListener("redraw", redrawAll); // colours were changed from outside

open(current);
connect(() => {
  ready = false;
  started.clear();
  byId("state-text").textContent = "The lab is closed, or the connection is lost. Trying again…";
  byId("state-bar").hidden = true;
});
