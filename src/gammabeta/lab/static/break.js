// Bench 5: break, diagnose, mend.
import { ask, byId, figure, forget, isAsked, on, percent, send } from "./core.js";
import { axes, draw, line } from "./charts.js";

const LEVEL = { error: "Error", warning: "Warning", note: "Note" };

export function setUpBreaking() {
  let curve = [];
  let steps = 120;
  let mended = null;
  const switches = [...document.querySelectorAll('[data-setting^="break."]')];

  function show(frame) {
    ({ curve, steps } = frame);
    const [step, inTraining, inEvaluation] = curve.at(-1);
    const told = byId("break-told");
    told.textContent = `Step ${frame.step} of ${steps}; loss ${figure(frame.loss)} nats. At step ${step}: train() ${percent(inTraining)}, eval() ${percent(inEvaluation)}.`;
    told.dataset.finished = frame.finished ? "yes" : "";
    told.dataset.step = frame.step;
    byId("break-train").textContent = frame.finished ? "Train anew" : "Training…";
    for (const id of ["break-diagnose", "break-mend"]) byId(id).disabled = frame.step < 10;
    paint();
  }

  function paint() {
    const canvas = byId("break-curve");
    canvas.setAttribute("aria-label", byId("break-told").textContent);
    draw(canvas, (context, width, height, now) => {
      const { px, py } = axes(context, width, height, now, { x: [0, steps], y: [0, 100] });
      const of = (k) => curve.map((row) => [px(row[0]), py(100 * row[k])]);
      line(context, of(1), now.without, { dash: [6, 3], width: 2.5 });
      line(context, of(2), now.with, { width: 2.5 });
      if (mended) {
        context.fillStyle = now.third;
        context.beginPath();
        context.arc(px(curve.at(-1)[0]) - 4, py(100 * mended.after), 6, 0, 7);
        context.fill();
      }
      context.textAlign = "right";
      context.textBaseline = "bottom";
      ["– –  train()", "——  eval()", ...(mended ? ["●  eval(), mended"] : [])].forEach((text, i) => {
        context.fillStyle = [now.without, now.with, now.third][i];
        context.fillText(text, width - 14, height - 62 + 16 * i);
      });
    });
  }

  function showReport(message) {
    byId("break-verdict").textContent = message.verdict;
    byId("break-verdict").dataset.checks = message.groups.map((g) => g.check).join(" ");
    const blocks = message.groups.map((group) => {
      const block = document.createElement("div");
      block.className = `finding ${group.severity}-level`;
      const title = document.createElement("h4");
      title.textContent = `${LEVEL[group.severity]}: ${group.check}, in ${group.layers}`;
      const list = document.createElement("dl");
      for (const key of ["found", "cause", "fix"]) {
        const [term, text] = [document.createElement("dt"), document.createElement("dd")];
        term.textContent = key;
        text.textContent = group[key];
        list.append(term, text);
      }
      block.append(title, list);
      return block;
    });
    const whole = document.createElement("p");
    const link = document.createElement("a");
    link.href = `/report/${message.report}`;
    link.target = "_blank";
    link.rel = "noopener";
    link.textContent = "The whole report, with pictures, in a new tab";
    whole.append(link);
    byId("break-findings").replaceChildren(...blocks, whole);
  }

  function showMended(message) {
    mended = message;
    const place = byId("break-mended");
    const remains = message.remains.length ? message.remains : ["Nothing else was wrong."];
    const first = document.createElement("p");
    first.textContent = message.trouble ?? `Recalibrated on 2,048 mixed training images: eval() ${percent(message.before)} → ${percent(message.after)}. What it does not bring back:`;
    const list = document.createElement("ul");
    for (const text of remains) {
      const item = document.createElement("li");
      item.textContent = text;
      list.append(item);
    }
    place.replaceChildren(first, list);
    place.dataset.after = message.after;
    paint();
  }

  function examine(what, told) {
    byId("break-verdict").textContent = what === "diagnose" ? told : byId("break-verdict").textContent;
    ask({ do: "break.do", what });
  }

  on("break.train", show);
  on("break.frame", (message) => {
    send({ do: "seen", bench: "break" });
    if (!isAsked("break.train")) show(message);
  });
  on("break.do", (message) => ({ diagnose: showReport, mend: showMended, stop: show })[message.what](message));
  byId("break-train").addEventListener("click", () => {
    mended = null;
    byId("break-mended").replaceChildren();
    byId("break-findings").replaceChildren();
    byId("break-verdict").textContent = "Not asked yet.";
    delete byId("break-verdict").dataset.checks;
    byId("break-told").dataset.finished = "";
    forget("break.do"); // it was about the network before
    ask({ do: "break.train", faults: switches.filter((s) => s.checked).map((s) => s.id.split(".")[1]) });
  });
  byId("break-diagnose").addEventListener("click", () => examine("diagnose", "The doctor is at work…"));
  byId("break-mend").addEventListener("click", () => examine("mend"));
  return {
    start() {
      curve = [];
      draw(byId("break-curve"), (context, width, height, now) => axes(context, width, height, now, { x: [0, steps], y: [0, 100] }));
    },
    leave() {
      if (byId("break-train").textContent === "Training…") ask({ do: "break.do", what: "stop" });
    },
    failed() {
      byId("break-train").textContent = "Train";
    },
  };
}
