// Bench 3: one channel through the equations.
import { ask, byId, figure, on, onSettings, setting, showSetting } from "./core.js";
import { axes, draw, heap, line } from "./charts.js";

export function setUpChannel() {
  let own = true; // the layer's own γ, β, ε are shown
  let batch = 0;

  function look() {
    const message = { do: "channel", layer: setting("channel.layer"), channel: setting("channel.channel"), draw: batch };
    if (!own) for (const name of ["gamma", "beta", "eps"]) message[name] = setting(`channel.${name}`);
    ask(message);
  }

  function show(found) {
    byId("channel.channel").max = found.channels - 1;
    showSetting("channel.channel", found.channel);
    if (own) for (const name of ["gamma", "beta", "eps"]) showSetting(`channel.${name}`, found[name]);
    const n = (v) => figure(v, 4);
    const deviation = n(Math.sqrt(found.var + found.eps));
    const equations = [
      `x: the ${found.count.toLocaleString("en")} values that enter. μ = ${n(found.mean)}, σ² = ${n(found.var)}`,
      `x − μ = x − (${n(found.mean)})`,
      `x̂ = (x − μ) / √(σ² + ε) = (x − μ) / √(${n(found.var)} + ${n(found.eps)}) = (x − μ) / ${deviation}`,
      `γ x̂ = ${n(found.gamma)} · x̂`,
      `y = γ x̂ + β = γ x̂ + (${n(found.beta)})`,
      `activation: max(y, 0)`,
    ];
    const place = byId("channel-steps");
    if (!place.children.length) {
      place.replaceChildren(
        ...equations.map((_, i) => {
          const item = document.createElement("li");
          const text = document.createElement("p");
          text.className = "equation";
          const canvas = document.createElement("canvas");
          canvas.dataset.height = 130;
          canvas.setAttribute("role", "img");
          const numbers = document.createElement("p");
          numbers.className = "hint";
          item.append(text, canvas, numbers);
          return item;
        }),
      );
    }
    found.steps.forEach((step, i) => {
      const [text, canvas, numbers] = place.children[i].children;
      text.textContent = equations[i];
      numbers.textContent = `mean ${figure(step.mean)}, standard deviation ${figure(step.std)}`;
      canvas.setAttribute("aria-label", `Histogram of ${step.name}: ${numbers.textContent}`);
      heap(canvas, found.steps, step, i < 2 ? "without" : i < 5 ? "with" : "third");
    });
    showBackward(found);
    byId("channel-steps").dataset.count = Number(byId("channel-steps").dataset.count ?? 0) + 1;
  }

  function showBackward(found) {
    const back = found.backward;
    const [mean, projection, left] = back.shares.map((s) => `${figure(100 * s, 2)} %`);
    byId("channel-told").textContent =
      `g is the gradient from above. Of its squared length the batch takes away ${mean} with the mean and ${projection} with the slope along x̂; ${left} goes on.` +
      ` ∂L/∂γ = ${figure(back.dgamma)}, ∂L/∂β = ${figure(back.dbeta)}.`;
    byId("channel-backward").textContent =
      `= ${figure(back.slope)} · ( g − (${figure(back.mean)}) − x̂ · (${figure(back.projection)}) ). What goes on adds up to ${figure(back.dx_sum, 1)}, and along x̂ to ${figure(back.dx_along, 1)}: rounding.`;
    const low = Math.min(...back.g, ...back.left), high = Math.max(...back.g, ...back.left);
    const ends = [Math.min(...back.xhat), Math.max(...back.xhat)];
    for (const [id, values, mean_, slope] of [["channel-g", back.g, back.mean, back.projection], ["channel-left", back.left, 0, 0]]) {
      draw(byId(id), (context, width, height, now) => {
        const { px, py } = axes(context, width, height, now, { x: ends, y: [low, high || 1], name: "gradient, against x̂" });
        context.fillStyle = now.with;
        context.globalAlpha = 0.5;
        back.xhat.forEach((x, i) => context.fillRect(px(x) - 1.5, py(values[i]) - 1.5, 3, 3));
        context.globalAlpha = 1;
        line(context, ends.map((x) => [px(x), py(mean_ + slope * x)]), now.without, { dash: [6, 3] });
      });
    }
  }

  on("channel", show);
  onSettings("channel", (name) => {
    own = !["channel.gamma", "channel.beta", "channel.eps"].includes(name) && (own || name === "channel.layer" || name === "channel.channel");
    look();
  });
  byId("channel-own").addEventListener("click", () => {
    own = true;
    look();
  });
  byId("channel-draw").addEventListener("click", () => {
    batch = (batch + 1) % 10000;
    look();
  });
  const query = new URLSearchParams(location.search);
  if (["gamma", "beta", "eps"].some((n) => query.has(`channel.${n}`))) own = false;
  return { start: look };
}
