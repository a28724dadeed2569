// Bench 2: the race. Frames come as fast as they are computed; each is acknowledged, or the training waits.
import { ask, byId, figure, on, onSettings, percent, send, setting } from "./core.js";
import { axes, band, draw, line } from "./charts.js";

const TWINS = ["with", "without"];
const TEXT = { with: "With batch norm", without: "Without" };
const NAMES = { conv1: "after convolution 1", conv2: "after convolution 2" };
const MOST = 600; // points of a curve that are drawn

export function setUpRace() {
  let losses = { with: [], without: [] };
  let ribbons = []; // [step, frame's ribbons]
  let running = false;
  let waiting = 0;
  let frames = 0;
  let drawing = 0; // the animation frame in which what has come is drawn, once

  function reset() {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const values = Object.fromEntries(["rate", "batch", "scale", "depth", "activation", "seed"].map((n) => [n, setting(`race.${n}`)]));
      ask({ do: "race.set", ...values });
    }, 120);
  }

  function take(message) {
    if (message.since === 0) {
      losses = { with: [], without: [] };
      ribbons = [];
    }
    for (const twin of TWINS) losses[twin].push(...message.twins[twin].losses.map((v) => v ?? NaN));
    if (!ribbons.length || ribbons.at(-1)[0] !== message.step) ribbons.push([message.step, message.ribbons]);
    if (ribbons.length > 2 * MOST) ribbons = ribbons.filter((_, i) => i % 2 === 0);
    tellRunning(message.running);
    for (const twin of TWINS) tell(twin, message.twins[twin], message.step);
    drawing ||= requestAnimationFrame(() => {
      drawing = 0;
      drawLosses();
      drawRibbons();
      document.documentElement.dataset.frames = ++frames;
    });
  }

  function tellRunning(now) {
    running = now;
    byId("race-go").textContent = running ? "Pause" : "Start";
    byId("race-go").setAttribute("aria-pressed", String(running));
  }

  function tell(twin, state, step) {
    const tested = state.test_accuracy !== null;
    byId(`race-${twin}`).textContent = tested ? percent(state.test_accuracy) : "–";
    byId(`race-${twin}`).dataset.best = state.best;
    const told = byId(`race-${twin}-told`);
    const text = state.lost ?? (tested ? `of 1,000 test images right` : step ? "not tested yet" : "at the start");
    if (told.textContent !== text) told.textContent = text;
    told.classList.toggle("lost", Boolean(state.lost));
  }

  function drawLosses() {
    const canvas = byId("race-loss");
    const steps = losses.with.length;
    canvas.dataset.steps = steps;
    canvas.setAttribute("aria-label", `Loss after ${steps} steps: ${TWINS.map((t) => `${TEXT[t]} ${figure(losses[t].at(-1))}`).join(", ")} nats`);
    draw(canvas, (context, width, height, now) => {
      const finite = [...losses.with, ...losses.without].filter((v) => Number.isFinite(v) && v > 0);
      const top = Math.min(1e6, Math.max(5, ...finite));
      const low = Math.max(1e-3, Math.min(0.5, ...finite));
      const { px, py } = axes(context, width, height, now, { x: [0, Math.max(steps, 20)], y: [low, top], log: true });
      line(context, [[px(0), py(Math.LN10)], [px(Math.max(steps, 20)), py(Math.LN10)]], now.soft, { width: 1, dash: [2, 4] });
      const stride = Math.max(1, Math.ceil(steps / MOST));
      for (const twin of ["without", "with"]) {
        const points = [];
        for (let i = 0; i < steps; i += stride) {
          const part = losses[twin].slice(i, i + stride);
          points.push([px(i + 1), py(Math.min(top, part.reduce((a, b) => a + b, 0) / part.length))]);
        }
        line(context, points, now[twin], { dash: twin === "without" ? [6, 3] : [] });
      }
      context.textAlign = "right";
      context.textBaseline = "top";
      TWINS.forEach((twin, i) => {
        context.fillStyle = now[twin];
        context.fillText(`${twin === "with" ? "——" : "– –"} ${TEXT[twin]}`, width - 12, 6 + 16 * i);
      });
    });
  }

  function drawRibbons() {
    const names = Object.keys(ribbons.at(-1)[1].with);
    const place = byId("race-ribbons");
    if (place.dataset.names !== names.join()) {
      place.dataset.names = names.join();
      place.replaceChildren(
        ...names.map((name) => {
          const block = document.createElement("div");
          const title = document.createElement("h4");
          title.textContent = NAMES[name] ?? `after linear layer ${name.slice(2)}`;
          const canvas = document.createElement("canvas");
          canvas.setAttribute("role", "img");
          canvas.dataset.height = 150;
          canvas.id = `race-ribbon-${name}`;
          block.append(title, canvas);
          return block;
        }),
      );
    }
    for (const name of names) {
      const canvas = byId(`race-ribbon-${name}`);
      const now = ribbons.at(-1)[1];
      canvas.setAttribute("aria-label", TWINS.map((t) => `${TEXT[t]}: median ${figure(now[t][name]?.[1])}, from ${figure(now[t][name]?.[0])} to ${figure(now[t][name]?.[2])}`).join("; "));
      draw(canvas, (context, width, height, palette) => {
        const of = (twin) => ribbons.map(([step, all]) => [step, all[twin][name]]).filter(([, v]) => v);
        const every = TWINS.flatMap((twin) => of(twin).flatMap(([, v]) => [v[0], v[2]]));
        // The twin may go anywhere: what lies beyond four times the other's ribbon leaves the frame.
        const widest = Math.max(0.5, ...of("with").flatMap(([, v]) => [Math.abs(v[0]), Math.abs(v[2])]));
        const limit = Math.min(4 * widest, 1.1 * Math.max(widest, ...every.map(Math.abs)));
        const { px, py, frame } = axes(context, width, height, palette, { x: [0, Math.max(ribbons.at(-1)[0], 20)], y: [-limit, limit] });
        context.save();
        context.beginPath();
        context.rect(frame.left, frame.top, frame.right - frame.left, frame.bottom - frame.top);
        context.clip();
        for (const twin of ["without", "with"]) {
          const points = of(twin);
          const at = (k) => points.map(([step, v]) => [px(step), py(v[k])]);
          if (!points.length) continue;
          band(context, at(2), at(0), palette[twin]);
          for (const k of [0, 2]) line(context, at(k), palette[twin], { width: 1, dash: twin === "without" ? [5, 3] : [] });
          line(context, at(1), palette[twin], { width: 2, dash: twin === "without" ? [5, 3] : [] });
        }
        context.restore();
      });
    }
  }

  on("race.set", take);
  on("race.run", take);
  on("race.frame", (message) => {
    send({ do: "seen", bench: "race" });
    take(message);
  });
  const go = (what) => send({ do: "race.run", go: what });
  byId("race-go").addEventListener("click", () => {
    go(running ? "pause" : "start");
    if (!running) tellRunning(true);
  });
  byId("race-step").addEventListener("click", () => go("step"));
  byId("race-reset").addEventListener("click", reset);
  onSettings("race", reset);
  return {
    start: reset,
    leave() {
      if (running) go("pause");
    },
  };
}
