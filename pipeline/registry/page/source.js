// A video file or the camera, frame by frame.

const LONGEST_SIDE = 1280; // pixels; `slotmatch segment` shrinks larger videos too
const WAIT = 3000; // ms, for a frame to come

export class Source {
  live = false; // a camera
  name = "";
  interval = 0; // seconds from a frame to the next, of a file
  time = 0; // of the frame that is shown, seconds
  #video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, preload: "auto" });
  #canvas = document.createElement("canvas");

  /** Opens a file at its first frame. */
  static async file(file) {
    const source = new Source();
    source.name = file.name;
    try {
      await source.#load(() => (source.#video.src = URL.createObjectURL(file)));
    } catch {
      source.close();
      throw new Error(`${file.name} is not a video that this browser can play`);
    }
    await source.#measure();
    await source.rewind();
    return source;
  }

  static async camera() {
    if (!navigator.mediaDevices) throw new Error("No camera: the page comes neither by https nor from localhost");
    const wanted = { video: { facingMode: "environment", width: { ideal: 640 } }, audio: false };
    const stream = await navigator.mediaDevices.getUserMedia(wanted).catch((error) => {
      if (error.name === "NotAllowedError") throw new Error("No camera: it was not allowed");
      if (error.name === "NotFoundError") throw new Error("No camera was found on this machine");
      throw new Error(`No camera: ${error.message}`);
    });
    const source = new Source();
    Object.assign(source, { live: true, name: "Camera" });
    await source.#load(() => (source.#video.srcObject = stream));
    await source.#video.play();
    return source;
  }

  get ended() {
    return !this.live && (this.#video.ended || this.time + this.interval * 1.25 > this.#video.duration);
  }

  /** Plays at a speed from 0.0625 (the least that browsers know) to 1. */
  async play() {
    await this.#video.play();
  }

  set speed(speed) {
    if (!this.live) this.#video.playbackRate = Math.min(1, Math.max(0.0625, speed));
  }

  get speed() {
    return this.#video.playbackRate;
  }

  pause() {
    this.#video.pause();
  }

  /** Waits for the next frame of a video that plays; false: there is none, as it ended or was paused. */
  async next() {
    const before = this.time;
    const time = await this.#frame(["pause", "ended"]);
    if (time === null) return false;
    this.time = time;
    return this.live || time !== before ? true : this.next();
  }

  /** Goes on by a frame; false: there is none. A camera's is the one that it sees now. */
  async step() {
    if (this.live) {
      await this.#video.play();
      await this.#frame(["ended"]);
      this.#video.pause();
      return true;
    }
    if (this.ended) return false;
    await this.#seek(this.time + this.interval * 1.5); // the middle of the next frame
    return true;
  }

  rewind() {
    return this.#seek(0);
  }

  /** The pixels of the frame that is shown. */
  grab() {
    const { videoWidth, videoHeight } = this.#video;
    const shrink = Math.min(1, LONGEST_SIDE / Math.max(videoWidth, videoHeight));
    const [width, height] = [Math.round(videoWidth * shrink), Math.round(videoHeight * shrink)];
    if (this.#canvas.width !== width || this.#canvas.height !== height) Object.assign(this.#canvas, { width, height });
    const context = this.#canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#video, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  }

  close() {
    this.#video.pause();
    this.#video.srcObject?.getTracks().forEach((track) => track.stop());
    if (this.#video.src) URL.revokeObjectURL(this.#video.src);
    this.#video.removeAttribute("src");
    this.#video.srcObject = null;
  }

  #load(begin) {
    return new Promise((resolve, reject) => {
      // A file with sound alone loads too, and has no size.
      this.#video.onloadeddata = () => (this.#video.videoWidth ? resolve() : reject(new Error("no picture")));
      this.#video.onerror = () => reject(this.#video.error);
      begin();
    });
  }

  /** The time of the next frame to be shown; null once one of the events comes before it. */
  #frame(events) {
    return new Promise((resolve) => {
      const end = (time) => {
        this.#video.cancelVideoFrameCallback(handle);
        for (const event of events) this.#video.removeEventListener(event, stop);
        resolve(time);
      };
      const stop = () => end(null);
      const handle = this.#video.requestVideoFrameCallback((_, { mediaTime }) => end(mediaTime));
      for (const event of events) this.#video.addEventListener(event, stop);
    });
  }

  async #seek(time) {
    const shown = this.#frame([]);
    const sought = new Promise((resolve) => this.#video.addEventListener("seeked", resolve, { once: true }));
    this.#video.currentTime = time;
    await sought;
    const late = new Promise((resolve) => setTimeout(resolve, WAIT, time));
    this.time = await Promise.race([shown, late]);
  }

  /** Finds the time between two frames, which browsers don't tell, by playing a few, slowly enough to miss none. */
  async #measure() {
    const times = [];
    this.#video.playbackRate = 0.5;
    const stop = setTimeout(() => this.#video.pause(), WAIT);
    await this.#video.play();
    while (times.length < 8) {
      const time = await this.#frame(["pause", "ended"]);
      if (time === null) break;
      times.push(time);
    }
    clearTimeout(stop);
    this.#video.pause();
    this.#video.playbackRate = 1;
    const between = times.slice(1).map((time, n) => time - times[n]);
    this.interval = Math.min(...between.filter((seconds) => seconds > 0.001), 1);
  }
}
