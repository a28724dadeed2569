// Bench 6: the weights before and after folding, and the last bits of the outputs.
import { ask, byId, figure, on, onSettings, setting } from "./core.js";
import { maps } from "./charts.js";

export function setUpFolding() {
  const look = () => ask({ do: "fold", layer: setting("fold.layer"), channel: setting("fold.channel"), first: setting("fold.first") });

  function show({ weights, difference }) {
    byId("fold.channel").max = weights.channels - 1;
    const n = (v) => figure(v, 4);
    byId("fold-equation").textContent =
      `w′ = w · γ / √(σ² + ε) = w · ${n(weights.gamma)} / √(${n(weights.var)} + ${n(weights.eps)}) = w · ${n(weights.factor)};   ` +
      `b′ = β + (b − μ) · γ / √(σ² + ε) = ${n(weights.bias[1])}`;
    for (const [i, key] of [[0, "before"], [1, "after"]]) {
      const canvas = byId(`fold-${key}`);
      const text = `${weights.layer}, channel ${weights.channel}: largest weight ${n(weights[key].scale)}, bias ${n(weights.bias[i])}`;
      canvas.setAttribute("aria-label", text);
      byId(`fold-bias-${key}`).textContent = text;
      maps(canvas, weights[key], {});
    }
    const told = byId("fold-told");
    told.textContent =
      `The largest difference of all logits is ${figure(difference.largest, 2)}, where the largest logit is ${figure(difference.size)}. ` +
      `${difference.same_answers} of ${difference.images} answers are the same. Below, the first of these images.`;
    told.dataset.largest = difference.largest;
    byId("fold-rows").replaceChildren(
      ...difference.rows.map((row, digit) => {
        const line = document.createElement("tr");
        const head = document.createElement("th");
        head.scope = "row";
        head.textContent = digit;
        line.append(head);
        for (const [text, bits] of [[figure(row.value, 6), false], [row.before.replace("0000000p", "p"), true], [row.after.replace("0000000p", "p"), true], [row.ulps, false]]) {
          const cell = document.createElement("td");
          if (bits) cell.className = "bits";
          cell.textContent = text;
          line.append(cell);
        }
        return line;
      }),
    );
  }

  on("fold", show);
  on("fold.times", (message) => {
    byId("fold-timed").textContent = `One image: ${message.before.toFixed(2)} ms in evaluation, ${message.after.toFixed(2)} ms folded (medians of 30, in turn).`;
  });
  byId("fold-times").addEventListener("click", () => {
    byId("fold-timed").textContent = "Measuring…";
    ask({ do: "fold.times" });
  });
  onSettings("fold", look);
  return { start: look };
}
