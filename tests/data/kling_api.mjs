// `kling-api` of the npm registry against our server: node kling_api.mjs URL ACCESS SECRET PICTURE FOLDER
import { writeFileSync } from "node:fs";
import { KlingAPI } from "kling-api";

const [url, accessKey, secretKey, picture, folder] = process.argv.slice(2);
const api = new KlingAPI({ accessKey, secretKey, baseUrl: url });
const wait = { interval: 200 };

const text = await api.textToVideo({
  model_name: "kling-v1",
  prompt: "a red ball rolls left on grass",
  duration: "5",
  mode: "std",
  cfg_scale: 0.5,
  aspect_ratio: "1:1",
  camera_control: { type: "simple", config: { horizontal: 0, vertical: 0, pan: 5, tilt: 0, roll: 0, zoom: 0 } },
  external_task_id: "npm",
});
const done = await api.waitForVideoResult(text.data.task_id, undefined, wait);
const saved = [`${folder}/npm.mp4`]; // its own saveVideoResult reaches no private address, such as this one
writeFileSync(saved[0], Buffer.from(await (await fetch(done.data.task_result.videos[0].url)).arrayBuffer()));
const image = await api.imageToVideo({ model_name: "kling-v1", image: picture, prompt: "the ball rolls on", duration: "5" });
const moved = await api.waitForVideoResult(image.data.task_id, api.queryImageToVideoTask.bind(api), wait);
const longer = await api.extendVideo({ video_id: done.data.task_result.videos[0].id, prompt: "it rolls on" });
let refused = null;
try {
  await api.multiImageToVideo({ image_list: [{ image: picture }, { image: picture }], prompt: "two", model_name: "kling-v1-6" });
} catch (error) {
  refused = { code: error.code, message: error.message };
}
console.log(JSON.stringify({ done, moved, longer, saved, refused }));
