// Small drawings on canvas: lines, ribbons, heaps, dots, maps. Each is drawn again when size or colours change.

const drawings = new Map(); // canvas -> function(context, width, height, colours)

export function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return Object.fromEntries(
    ["ink", "soft", "line", "grid", "panel", "with", "without", "third", "accent", "minus", "plus", "zero"].map((n) => [n, of(n)]),
  );
}

/** Keep how a canvas is drawn, and draw it now if it can be seen. */
export function draw(canvas, how) {
  drawings.set(canvas, how);
  paint(canvas, colours());
}

export function redrawAll() {
  const now = colours();
  for (const canvas of drawings.keys()) canvas.isConnected ? paint(canvas, now) : drawings.delete(canvas);
}

function paint(canvas, now) {
  const width = canvas.dataset.fixed ? Number(canvas.dataset.fixed) : canvas.clientWidth;
  if (!width || !canvas.offsetParent) return;
  const height = "square" in canvas.dataset || canvas.dataset.fixed ? width : Number(canvas.dataset.height ?? 150);
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  drawings.get(canvas)(context, width, height, now);
}

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough) ?? rough;
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return found;
}

const label = (t) => {
  const size = Math.abs(t);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? t.toExponential(0) : String(Number(t.toPrecision(3)));
  return text.replaceAll("-", "−");
};

/** Axes with few lines; returns functions from values to pixels. */
export function axes(context, width, height, now, { x, y, xs = null, log = false, name = "", xlabel = label, ylabel = label }) {
  const frame = { left: 44, right: width - 10, top: name ? 20 : 8, bottom: height - 22 };
  const place = (v) => (log ? Math.log10(Math.max(v, 1e-12)) : v);
  const [low, high] = [place(y[0]), place(y[1])];
  const px = (v) => frame.left + ((v - x[0]) / (x[1] - x[0] || 1)) * (frame.right - frame.left);
  // What lies far outside stays near: the browser would count the dashes all the way there.
  const near = (at) => Math.max(-height, Math.min(2 * height, at));
  const py = (v) => near(frame.bottom - ((place(v) - low) / (high - low || 1)) * (frame.bottom - frame.top));
  context.lineWidth = 1;
  context.strokeStyle = now.grid;
  context.fillStyle = now.soft;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const marks = log
    ? Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, i) => 10 ** (Math.ceil(low) + i))
    : ticks(y[0], y[1], Math.max(4, Math.floor(height / 55)));
  for (const t of marks) {
    context.beginPath();
    context.moveTo(frame.left, py(t));
    context.lineTo(frame.right, py(t));
    context.stroke();
    context.fillText(ylabel(t), frame.left - 5, py(t));
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const t of xs ?? ticks(x[0], x[1], Math.max(2, Math.floor(width / 90)))) context.fillText(xlabel(t), px(t), frame.bottom + 5);
  if (name) {
    context.textAlign = "left";
    context.fillStyle = now.ink;
    context.fillText(name, frame.left, 3);
  }
  return { px, py, frame };
}

export function line(context, points, colour, { width = 2, dash = [] } = {}) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.setLineDash(dash);
  context.lineJoin = "round";
  context.beginPath();
  let down = false;
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) down = false;
    else if (down) context.lineTo(x, y);
    else {
      context.moveTo(x, y);
      down = true;
    }
  }
  context.stroke();
  context.setLineDash([]);
}

export function band(context, upper, lower, colour) {
  context.fillStyle = colour;
  context.globalAlpha = 0.22;
  context.beginPath();
  upper.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  lower.toReversed().forEach(([x, y]) => context.lineTo(x, y));
  context.closePath();
  context.fill();
  context.globalAlpha = 1;
}

/** A heap of values between shared borders, its mean marked. */
export function heap(canvas, steps, step, colourName) {
  draw(canvas, (context, width, height, now) => {
    const low = Math.min(...steps.map((s) => s.low), 0);
    const high = Math.max(...steps.map((s) => s.high), 0);
    const most = Math.max(...step.counts) * 1.08;
    const room = (high - low) * 0.03;
    const { px, py, frame } = axes(context, width, height, now, { x: [low - room, high + room], y: [0, most], ylabel: (t) => (t >= 1000 ? `${label(t / 1000)}k` : label(t)) });
    const each = (step.high - step.low) / step.counts.length;
    context.fillStyle = now[colourName];
    step.counts.forEach((count, i) => {
      const left = px(step.low + i * each);
      if (count) context.fillRect(left, py(count), Math.max(1, px(step.low + (i + 1) * each) - left), frame.bottom - py(count));
    });
    line(context, [[px(0), frame.top], [px(0), frame.bottom]], now.soft, { width: 1, dash: [3, 3] });
    line(context, [[px(step.mean), frame.top], [px(step.mean), frame.bottom]], now.ink, { width: 1.5 });
  });
}

export function unpacked(packed) {
  const text = atob(packed.data);
  const values = new Int8Array(text.length);
  for (let i = 0; i < text.length; i++) values[i] = text.charCodeAt(i);
  return { values, shape: packed.shape, scale: packed.scale };
}

function channels(colour) {
  const found = colour.match(/[0-9a-f]{2}/gi);
  return found.map((part) => parseInt(part, 16));
}

/** Maps (C, H, W) of signed bytes beside each other, blue above zero and orange below. */
export function maps(canvas, packed, { columns = null, grey = false, most = 64, side = null } = {}) {
  const { values, shape } = unpacked(packed);
  const [count, rows, cells] = shape;
  const shown = Math.min(count, most);
  draw(canvas, (context, width, height, now) => {
    const gap = 2;
    let across = columns;
    if (!across) {
      across = shown;
      const size = (n) => Math.min((width + gap) / n - gap, ((height + gap) / Math.ceil(shown / n) - gap) * (cells / rows));
      for (let n = 1; n <= shown; n++) if (size(n) > size(across)) across = n;
    }
    const down = Math.ceil(shown / across);
    const each = Math.min((width + gap) / across - gap, ((height + gap) / down - gap) * (cells / rows), side ?? 1e9);
    const [minus, plus, zero, ink, panel] = ["minus", "plus", "zero", "ink", "panel"].map((n) => channels(now[n]));
    const image = new ImageData(cells, rows);
    const tile = new OffscreenCanvas(cells, rows);
    context.imageSmoothingEnabled = false;
    for (let c = 0; c < shown; c++) {
      for (let i = 0; i < rows * cells; i++) {
        const value = values[c * rows * cells + i] / 127;
        const [from, to] = grey ? [panel, ink] : [zero, value < 0 ? minus : plus];
        for (let k = 0; k < 3; k++) image.data[4 * i + k] = from[k] + (to[k] - from[k]) * Math.abs(value);
        image.data[4 * i + 3] = 255;
      }
      tile.getContext("2d").putImageData(image, 0, 0);
      context.drawImage(tile, (c % across) * (each + gap), Math.floor(c / across) * (each * (rows / cells) + gap), each, each * (rows / cells));
    }
  });
}
