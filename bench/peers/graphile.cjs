// graphile-worker with undici: `fill EVENTS ENDPOINTS` or `work RECEIVER`; PostgreSQL comes from the PG* variables.
// Settings: 100 jobs at once, a local queue of 500, completions in batches of 5 ms, 16 connections to each endpoint's origin.
// Run in a directory whose node_modules has graphile-worker, pg and undici.
"use strict";
const load = require("node:module").createRequire(process.cwd() + "/");
const { createHmac } = require("node:crypto");
const { Pool: Database } = load("pg");
const { run, runMigrations } = load("graphile-worker");
const { Pool } = load("undici");

const BODY = JSON.stringify({ type: "email.delivered", version: "1.0", data: { text: "x".repeat(520) } });

async function fill(events, endpoints) {
  const pgPool = new Database();
  await runMigrations({ pgPool });
  await pgPool.query(
    `SELECT count(graphile_worker.add_job('deliver', json_build_object('n', n, 'e', n % $2::int, 'body', $3::text)))
     FROM generate_series(0, $1::int - 1) n`,
    [events, endpoints, BODY],
  );
  const { rows } = await pgPool.query("SELECT count(*) AS jobs FROM graphile_worker.jobs");
  console.log(rows[0].jobs);
  await pgPool.end();
}

async function work(receiver) {
  const client = new Pool(`http://${receiver}`, { connections: 160, pipelining: 1 });
  const deliver = async ({ n, e, body }) => {
    const { statusCode, body: answer } = await client.request({
      method: "POST",
      path: `/e${String(e).padStart(5, "0")}`,
      headers: {
        "content-type": "application/json",
        "x-trackpost-signature": createHmac("sha256", "secret").update(body).digest("hex"),
        "webhook-id": `evt_${String(n).padStart(32, "0")}`,
      },
      body,
    });
    await answer.dump();
    if (statusCode >= 300) throw new Error(`answered ${statusCode}`);
  };
  const runner = await run({
    pgPool: new Database({ max: 20 }),
    taskList: { deliver },
    noHandleSignals: true,
    preset: {
      worker: {
        concurrentJobs: 100,
        localQueue: { size: 500 },
        completeJobBatchDelay: 5,
        failJobBatchDelay: 5,
        pollInterval: 500,
      },
    },
    logger: new (load("graphile-worker").Logger)(() => () => {}),
  });
  await runner.promise;
}

const [command, ...rest] = process.argv.slice(2);
void (command === "fill" ? fill(Number(rest[0]), Number(rest[1])) : work(rest[0]));
