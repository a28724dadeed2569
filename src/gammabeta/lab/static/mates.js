// Bench 4: one image, other companions.
import { ask, byId, figure, forget, isStale, on, onSettings, setting } from "./core.js";
import { axes, draw, line, maps } from "./charts.js";

export function setUpMates() {
  let training = [];
  let evaluation = [];
  let answers = [];
  let rows = [];
  let number = 0;
  let running = false;

  const company = () => ({ image: setting("mates.image"), kind: setting("mates.kind"), digit: setting("mates.digit") });
  const exchange = () => ask({ do: "mates", ...company(), size: setting("mates.size"), draw: number++ % 10000 });

  function clear(name) {
    training = [];
    evaluation = [];
    answers = [];
    forget("mates");
    exchange();
    if (name === "mates.size") return;
    forget("mates.sizes"); // the curve was another image's, or other companions'
    showSizes({ rows: [] });
  }

  function deviation(values) {
    const about = values[0] ?? 0;
    const mean = values.reduce((sum, v) => sum + v - about, 0) / (values.length || 1);
    return Math.sqrt(values.reduce((sum, v) => sum + (v - about - mean) ** 2, 0) / (values.length || 1));
  }

  function show(message) {
    training.push(...message.training);
    evaluation.push(...message.evaluation);
    answers.push(...message.answers);
    while (training.length > 200) for (const list of [training, evaluation, answers]) list.shift();
    maps(byId("mates-image"), message.picture, { grey: true, columns: 1 });
    byId("mates-label").textContent = `The fixed image: a ${message.label}`;
    byId("mates-image").setAttribute("aria-label", `The fixed image: a ${message.label}`);
    const wrong = answers.filter((a) => a !== message.label).length;
    const told = byId("mates-told");
    told.textContent =
      `${training.length} draws. Spread of the logit (standard deviation): ${figure(deviation(training))} in training, ${figure(deviation(evaluation))} in evaluation. ` +
      `In training the image was taken for another digit ${wrong} times.`;
    told.dataset.training = deviation(training);
    told.dataset.evaluation = deviation(evaluation);
    const canvas = byId("mates-dots");
    canvas.setAttribute("aria-label", told.textContent);
    draw(canvas, (context, width, height, now) => {
      const every = [...training, ...evaluation];
      const [low, high] = [Math.min(...every), Math.max(...every)];
      const room = Math.max(0.5, (high - low) * 0.1);
      const { px, py } = axes(context, width, height, now, { x: [0, Math.max(training.length, 16)], y: [low - room, high + room], name: "● training   ── evaluation" });
      context.fillStyle = now.without;
      training.forEach((v, i) => {
        context.beginPath();
        context.arc(px(i + 0.5), py(v), 3, 0, 7);
        context.fill();
      });
      line(context, evaluation.map((v, i) => [px(i + 0.5), py(v)]), now.with, { width: 3 });
    });
    if (running) exchange();
  }

  function showSizes(message) {
    rows = message.rows;
    const canvas = byId("mates-curve");
    const text = rows.map(([size, a, b]) => `batch of ${size}: ${figure(a)} in training, ${figure(b)} in evaluation`).join("; ");
    canvas.setAttribute("aria-label", `Spread of the logit. ${text}`);
    draw(canvas, drawSizes);
  }

  function drawSizes(context, width, height, now) {
    const most = Math.max(0.1, ...rows.map((row) => row[1]));
    const { px, py } = axes(context, width, height, now, { x: [0.8, 8.2], y: [0, most * 1.1], xs: [1, 2, 3, 4, 5, 6, 7, 8], xlabel: (t) => String(2 ** t), name: rows.length ? "– ● – training   ── evaluation" : "press “Measure every batch size”" });
    const of = (k) => rows.map((row) => [px(Math.log2(row[0])), py(row[k])]);
    line(context, of(1), now.without, { dash: [6, 3] });
    context.fillStyle = now.without;
    for (const [x, y] of of(1)) {
      context.beginPath();
      context.arc(x, y, 4, 0, 7);
      context.fill();
    }
    line(context, of(2), now.with, { width: 3 });
  }

  function run(wanted) {
    running = wanted;
    byId("mates-go").textContent = running ? "Stop" : "Exchange on and on";
    byId("mates-go").setAttribute("aria-pressed", String(running));
    if (running) exchange();
  }

  on("mates", show);
  on("mates.part", (message) => isStale("mates.sizes") || showSizes(message));
  on("mates.sizes", showSizes);
  byId("mates-go").addEventListener("click", () => run(!running));
  byId("mates-once").addEventListener("click", exchange);
  byId("mates-sizes").addEventListener("click", () => ask({ do: "mates.sizes", ...company() }));
  onSettings("mates", clear);
  return {
    start() {
      draw(byId("mates-curve"), drawSizes);
      exchange();
    },
    leave: () => run(false),
    failed: () => run(false),
  };
}
