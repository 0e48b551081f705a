// A page opened from a folder may start no Worker, and the search is one. Here it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      const begin = () => {
        document.body.append(frame)
        this.inside = frame.contentWindow
        this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = this.inside.document.createElement("script")
        script.src = url
        script.onload = () => this.waiting.splice(0).forEach((data) => this.send(data))
        this.script = script
        this.inside.document.head.append(script)
      }
      if (document.body) begin()
      else addEventListener("DOMContentLoaded", begin)
    }

    set onmessage(listener) {
      this.addEventListener("message", listener)
    }

    postMessage(data) {
      if (this.ready) this.send(data)
      else this.waiting.push(data)
    }

    send(data) {
      this.ready = true
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))
    }
  }
}
