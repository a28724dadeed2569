// What every bench uses: settings (they stand in the address), the socket, numbers for people.

export const byId = (id) => document.getElementById(id);

// --- settings ---

const listeners = new Map(); // prefix -> function
const controls = [...document.querySelectorAll("[data-setting]")];
const plain = new Map(controls.map((c) => [c.id, c.type === "checkbox" ? c.checked : c.value]));

/** The value of a control as the server takes it. */
export function setting(name) {
  const control = byId(name);
  if (control.type === "checkbox") return control.checked;
  if (control.type !== "range") return /^\d+$/.test(control.value) ? Number(control.value) : control.value;
  const value = Number(control.value);
  if (control.dataset.scale === "log") return Number((10 ** value).toPrecision(2));
  return control.dataset.scale === "power" ? 2 ** value : value;
}

/** Show a value in a control without telling anybody. */
export function showSetting(name, value) {
  const control = byId(name);
  control.value = control.dataset.scale === "log" ? Math.log10(value) : value;
  tellValue(control);
}

/** Call a function when a control whose name begins with the prefix is moved. */
export function onSettings(prefix, changed) {
  listeners.set(prefix, changed);
}

function tellValue(control) {
  const output = byId(`${control.id}-value`);
  if (!output) return;
  const value = setting(control.id);
  const text = `${figure(value)}${control.dataset.unit}`;
  output.textContent = text;
  control.setAttribute("aria-valuetext", text);
}

/** Put the bench and every setting that is not the first one into the address. */
export function keepInAddress(bench) {
  const query = new URLSearchParams({ bench });
  for (const control of controls) {
    const value = control.type === "checkbox" ? control.checked : control.value;
    if (value !== plain.get(control.id)) query.set(control.id, value === true ? "1" : value);
  }
  history.replaceState(null, "", `?${query}`);
}

/** Set the controls as the address says; from now on tell `moved` and the bench when one is moved. */
export function readAddress(moved) {
  const query = new URLSearchParams(location.search);
  for (const control of controls) {
    const value = query.get(control.id);
    if (value !== null) {
      if (control.type === "checkbox") control.checked = value === "1";
      else control.value = value;
      if (control.tagName === "SELECT" && control.selectedIndex < 0) control.value = plain.get(control.id);
    }
    tellValue(control);
    control.addEventListener("input", () => {
      tellValue(control);
      moved();
      listeners.get(control.id.split(".")[0])?.(control.id);
    });
  }
  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (e) => e.preventDefault());
  return query.get("bench");
}

// --- numbers ---

/** A number for people. */
export function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const power = size !== 0 && (size < 1e-3 || size >= 1e5);
  if (!power) return String(Number(value.toPrecision(digits))).replace("-", "−");
  const [front, exponent] = value.toExponential(1).split("e");
  const raised = [...String(Number(exponent))].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
  return `${Number(front) === 1 ? "" : `${front.replace("-", "−")} · `}10${raised}`;
}

export function percent(share) {
  if (share === null || share === undefined) return "–";
  return share < 1 && share > 0.9995 ? "> 99.9 %" : `${(100 * share).toFixed(1)} %`;
}

// --- the socket ---

const handlers = new Map(); // what an answer is about -> function
const asked = new Map(); // kind -> the request on its way: { next: the newest behind it, stale: nobody wants its answer }
let socket = null;

export const connected = () => socket?.readyState === WebSocket.OPEN;

export function on(about, handle) {
  handlers.set(about, handle);
}

export function send(message) {
  if (connected()) socket.send(JSON.stringify(message));
}

export function ask(message) {
  const before = asked.get(message.do);
  if (before) before.next = message;
  else {
    asked.set(message.do, { next: null, stale: false });
    send(message);
  }
}

/** What was asked of these kinds is not wanted any more: what waits is not sent, what comes is not shown. */
export function forget(...kinds) {
  for (const kind of kinds) if (asked.has(kind)) asked.set(kind, { next: null, stale: true });
}

export const isAsked = (kind) => asked.has(kind);
export const isStale = (kind) => Boolean(asked.get(kind)?.stale);

function answered(kind) {
  const next = asked.get(kind)?.next;
  asked.delete(kind);
  if (next) ask(next);
}

/** Connect, and again when the connection is lost; `lost` is told then. */
export function connect(lost) {
  socket = new WebSocket(`ws://${location.host}/socket`);
  socket.addEventListener("message", (event) => {
    const message = JSON.parse(event.data);
    const kind = message.about === "error" ? message.request : message.about;
    const wanted = !isStale(kind);
    if (wanted) handlers.get(message.about)?.(message);
    if (wanted && message.code) byId(`${message.about.split(".")[0]}-code`).textContent = message.code;
    answered(kind);
  });
  socket.addEventListener("close", () => {
    asked.clear();
    lost();
    setTimeout(() => connect(lost), 2000);
  });
}

addEventListener("pagehide", () => socket?.close());
