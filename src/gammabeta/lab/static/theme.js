// The theme is set before the page is drawn: light, dark, or what the system says.
const kept = localStorage.getItem("theme");
if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
