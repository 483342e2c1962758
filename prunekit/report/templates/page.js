document.querySelectorAll(".filter").forEach(function (box) {
  var input = box.querySelector("input"), output = box.querySelector("output");
  var map = box.parentNode.querySelectorAll(".map")[Array.from(document.querySelectorAll(".filter")).indexOf(box)];
  box.hidden = false;
  input.addEventListener("input", function () {
    var word = input.value.trim().toLowerCase(), counts = [], total = 0;
    map.querySelectorAll("g").forEach(function (group) {
      var shown = 0;
      group.querySelectorAll("path").forEach(function (point) {
        var hit = point.querySelector("title").textContent.toLowerCase().indexOf(word) >= 0;
        point.classList.toggle("hidden", !hit);
        shown += hit;
      });
      if (shown) counts.push("expert " + group.dataset.expert + ": " + shown);
      total += shown;
    });
    output.textContent = word ? total + " prompts" + (total ? " – " + counts.join(", ") : "") : "";
  });
});
var dialog = document.querySelector("dialog");
function enlarge(box) {
  dialog.replaceChildren(box.firstElementChild.cloneNode(true));
  dialog.showModal();
}
document.querySelectorAll(".zoom").forEach(function (box) {
  box.classList.add("ready");
  box.addEventListener("click", function () { enlarge(box); });
  box.addEventListener("keydown", function (event) {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    enlarge(box);
  });
});
dialog.addEventListener("click", function () { dialog.close(); });
