// Bench 1: strokes go out while they are drawn, one request at a time; answers come back.
import { ask, byId, figure, forget, on, onSettings, percent, setting } from "./core.js";
import { draw, maps } from "./charts.js";

const LAYERS = { bn1: "Convolution 1 and its batch norm: 20 channels", bn2: "Convolution 2 and its batch norm: 50 channels", bn3: "Linear layer 1 and its batch norm: 128 channels" };
const STAGES = ["before batch norm", "after it", "after the activation"];

export function setUpDrawing() {
  const paper = () => byId("paper");
  let strokes = [];
  let number = 1;

  function paint(pixels = null) {
    draw(paper(), (context, width, height, now) => {
      context.fillStyle = now.panel;
      context.fillRect(0, 0, width, height);
      if (pixels) {
        // a test image, its ink in the colour of ours
        context.fillStyle = now.ink;
        const each = width / 28;
        pixels.forEach((value, i) => {
          context.globalAlpha = value / 255;
          context.fillRect((i % 28) * each, Math.floor(i / 28) * each, each + 0.5, each + 0.5);
        });
        context.globalAlpha = 1;
      }
      context.strokeStyle = context.fillStyle = now.ink;
      context.lineWidth = 0.075 * width;
      context.lineCap = context.lineJoin = "round";
      for (const stroke of strokes) {
        context.beginPath();
        stroke.forEach(([x, y], i) => (i ? context.lineTo(x * width, y * height) : context.moveTo(x * width, y * height)));
        if (stroke.length === 1) context.lineTo(stroke[0][0] * width + 0.1, stroke[0][1] * height);
        context.stroke();
      }
    });
  }

  function point(event) {
    const box = paper().getBoundingClientRect();
    const inside = (v) => Math.min(1, Math.max(0, Number(v.toFixed(3))));
    return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
  }

  function add(event) {
    const stroke = strokes.at(-1);
    for (const each of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) {
      const [x, y] = point(each);
      const last = stroke.at(-1);
      if (Math.hypot(x - last[0], y - last[1]) > 0.008 && stroke.length < 3000) stroke.push([x, y]);
    }
    paint();
    forget("draw.sample");
    ask({ do: "draw", strokes });
  }

  const canvas = byId("paper");
  let drawing = false;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || strokes.length >= 100) return;
    canvas.setPointerCapture(event.pointerId);
    drawing = true;
    strokes.push([point(event)]);
    add(event);
  });
  canvas.addEventListener("pointermove", (event) => drawing && add(event));
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (drawing = false));
  function empty() {
    strokes = [];
    paint();
    forget("draw", "draw.sample");
  }

  byId("draw-clear").addEventListener("click", () => {
    empty();
    byId("draw-answer").textContent = "Nothing drawn yet.";
    byId("draw-bars").replaceChildren();
  });
  const sample = () => {
    empty();
    ask({ do: "draw.sample", digit: setting("draw.digit"), number: number++ % 800 });
  };
  byId("draw-sample").addEventListener("click", sample);
  onSettings("draw", () => {
    number = 1;
    sample();
  });

  function show(message) {
    const answer = byId("draw-answer");
    answer.textContent = `This is a ${message.label}, ${percent(message.probability)} sure.`;
    if (message.doubt) {
      const doubt = document.createElement("span");
      doubt.className = "doubt";
      doubt.textContent = message.doubt;
      answer.append(doubt);
    }
    answer.dataset.label = message.label;
    answer.dataset.count = Number(answer.dataset.count ?? 0) + 1;
    const bars = byId("draw-bars");
    if (bars.children.length !== 3 * message.shares.length) {
      bars.replaceChildren(
        ...message.shares.flatMap(([name]) => {
          const [text, bar, share] = ["span", "span", "span"].map((tag) => document.createElement(tag));
          text.textContent = name;
          bar.className = "bar";
          bar.append(document.createElement("span"));
          return [text, bar, share];
        }),
      );
    }
    message.shares.forEach(([, share], i) => {
      bars.children[3 * i + 1].firstChild.style.width = `${100 * share}%`;
      bars.children[3 * i + 2].textContent = percent(share);
    });
    const pixels = message.seen.flat();
    draw(byId("draw-seen"), (context, width) => {
      const image = new ImageData(28, 28);
      pixels.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
      const tile = new OffscreenCanvas(28, 28);
      tile.getContext("2d").putImageData(image, 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(tile, 0, 0, width, width);
    });
    showLayers(message);
  }

  function showLayers(message) {
    const place = byId("draw-layers");
    if (!place.children.length) {
      for (const layer of message.layers) {
        const block = document.createElement("div");
        const title = document.createElement("h4");
        title.textContent = LAYERS[layer.name];
        block.append(title);
        STAGES.forEach((stage, i) => {
          const row = document.createElement("div");
          row.className = "stage";
          const text = document.createElement("span");
          text.append(stage, document.createElement("span"));
          text.lastChild.className = "unit";
          const picture = document.createElement("canvas");
          picture.dataset.height = layer.name === "bn3" ? 24 : layer.name === "bn2" ? 96 : 84;
          picture.setAttribute("role", "img");
          picture.id = `draw-${layer.name}-${i}`;
          row.append(text, picture);
          block.append(row);
        });
        place.append(block);
      }
    }
    for (const layer of message.layers) {
      layer.stages.forEach((stage, i) => {
        const picture = byId(`draw-${layer.name}-${i}`);
        const text = `largest ${figure(stage.scale, 2)}`;
        picture.previousSibling.lastChild.textContent = text;
        picture.setAttribute("aria-label", `${LAYERS[layer.name]}, ${STAGES[i]}; ${text}`);
        maps(picture, stage, { most: 128 });
      });
    }
  }
  on("draw", show);
  on("draw.sample", (message) => {
    show(message);
    paint(message.seen.flat());
  });
  return {
    start() {
      paint();
      sample();
    },
  };
}
