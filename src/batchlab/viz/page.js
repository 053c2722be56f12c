(() => {
  "use strict";
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const theme = document.getElementById("theme");
  const config = { displayModeBar: false, displaylogo: false, plotlyServerURL: "", responsive: true };

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  const recolour = (value) => {
    if (typeof value === "string") return Object.hasOwn(data.dark, value) ? data.dark[value] : value;
    if (Array.isArray(value)) return value.map(recolour);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recolour(item)]));
  };

  const draw = (plot) => {
    if (plot.closest("[hidden]")) return;
    const source = data.figures[plot.id];
    const figure = isDark() ? recolour(source) : structuredClone(source);
    figure.layout.dragmode = coarse.matches ? false : "zoom";
    figure.layout.autosize = true;
    if (plot.clientWidth < 480) figure.layout.font.size = 11;
    Plotly.newPlot(plot, figure.data, figure.layout, config);
  };
  const drawAll = () => document.querySelectorAll(".plot").forEach(draw);

  const nameTheme = () => {
    theme.textContent = isDark() ? "Light mode" : "Dark mode";
  };
  const restyle = () => {
    nameTheme();
    drawAll();
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    restyle();
  });
  prefersDark.addEventListener("change", () => {
    if (!root.dataset.theme) restyle();
  });

  document.querySelectorAll(".choice").forEach((choice) => {
    const buttons = [...choice.querySelectorAll("button[data-panel]")];
    const show = (chosen) =>
      buttons.forEach((button) => {
        const panel = document.getElementById(button.dataset.panel);
        button.setAttribute("aria-pressed", String(button === chosen));
        panel.hidden = button !== chosen;
      });
    buttons.forEach((button) =>
      button.addEventListener("click", () => {
        show(button);
        draw(document.getElementById(button.dataset.panel).querySelector(".plot"));
      }),
    );
    choice.querySelector(".buttons").hidden = false;
    show(buttons[0]);
  });

  document.querySelectorAll(".reset").forEach((button) => {
    const plot = document.getElementById(button.dataset.plot);
    button.addEventListener("click", () => draw(plot));
    button.hidden = false;
  });

  theme.hidden = false;
  restyle();
  root.dataset.ready = "true";
})();
