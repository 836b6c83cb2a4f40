// Generated from clients/js/src: npm --prefix clients/js run bundle
// dist/errors.js
var AutotagError = class extends Error {
	name = "AutotagError";
	code;
	hint;
	retryAfter;
	details;
	constructor(code, message, hint = "", details = {}) {
		super(message);
		this.code = code;
		this.hint = hint;
		this.details = details;
		this.retryAfter = typeof details["retry_after"] === "number" ? details["retry_after"] : null;
	}
};
function fromRest(error, status) {
	let details = {};
	try {
		const parsed = JSON.parse(error.details ?? "");
		if (parsed && typeof parsed === "object") details = parsed;
	} catch {}
	return new AutotagError(typeof details["code"] === "string" ? details["code"] : error.code || (status ? `http_${status}` : "network"), error.message, error.hint ?? "", details);
}
// dist/limit.js
const REQUEST_LIMIT = 3e4;
async function within(limit, who, run) {
	const control = new AbortController();
	let timer;
	const late = new Promise((_, reject) => {
		timer = setTimeout(() => {
			reject(new AutotagError("timeout", `${who} has not answered within ${limit / 1e3} seconds.`, "Try again."));
			control.abort();
		}, limit);
	});
	try {
		return await Promise.race([run(control.signal), late]);
	} finally {
		clearTimeout(timer);
	}
}
async function answerTo(query) {
	const builder = query;
	return await within(REQUEST_LIMIT, "The server", (signal) => {
		if (!builder.signal) builder.abortSignal?.(signal);
		return query;
	});
}
// dist/live.js
const LINGER = 1e3;
const FIRST_DELAY = 1e3;
const LONGEST_DELAY = 3e4;
const STEADY = 1e4;
const TOKEN_LIMIT = 1e4;
const PROVIDER = "The provider of the access token";
const MAX_JOBS = 1e3;
const LONG_HIDDEN = 3e4;
const own = new WeakSet();
function userOf(token) {
	if (!token || token.startsWith("sb_publishable_")) return null;
	try {
		const part = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
		const claims = JSON.parse(atob(part));
		return claims.sub ?? (claims.role === "anon" ? null : claims.role ?? null);
	} catch {
		return token;
	}
}
const isId = (id) => typeof id === "string" || Number.isSafeInteger(id);
var Live = class {
	status = "connecting";
	error = null;
	liveSince = 1e400;
	#listeners = new Set();
	#supabase;
	#topic;
	accessToken;
	kept = new Map();
	#channel = null;
	#left = Promise.resolve();
	#turn = 0;
	#failures = 0;
	#user;
	#refused = null;
	#timer;
	#lastListener;
	#stopWatching = null;
	#hasAuth = false;
	#hiddenAt = 0;
	#listsIds = false;
	#counted = new Map();
	#checked = Promise.resolve();
	constructor(supabase, workspaceId, accessToken) {
		this.#supabase = supabase;
		this.#topic = `tagging:${workspaceId}`;
		this.accessToken = accessToken;
	}
	listen(listener) {
		const added = { ...listener };
		this.#listeners.add(added);
		clearTimeout(this.#lastListener);
		if (!this.#stopWatching) {
			this.#stopWatching = this.#watch();
			this.#watchAuth();
			this.connect();
		}
		added.onStatus?.(this.status, this.error);
		if (this.status === "live") added.onSync?.();
		return () => {
			if (!this.#listeners.delete(added) || this.#listeners.size) return;
			clearTimeout(this.#lastListener);
			this.#lastListener = setTimeout(() => this.#stop(), LINGER);
		};
	}
	async connect() {
		this.#leave();
		if (!this.#listeners.size) return;
		const turn = this.#turn;
		if (this.status !== "refused" && this.status !== "signed-out") this.#say("connecting");
		await this.#left;
		if (turn !== this.#turn) return;
		let user;
		try {
			user = userOf(await this.#authorize());
		} catch (error) {
			if (turn === this.#turn) this.#failWith(error);
			return;
		}
		if (turn !== this.#turn) return;
		this.#meet(user);
		if (user === null) {
			this.#say("signed-out");
			this.#again(this.#hasAuth ? LONGEST_DELAY : this.#delay());
			return;
		}
		if (this.status === "signed-out") this.#say("connecting");
		const others = this.#supabase.getChannels().filter((channel) => !own.has(channel));
		const channel = this.#supabase.channel(this.#topic, { config: { private: true } });
		if (others.includes(channel) || channel.state !== "closed") {
			this.#fail(`Another part of this page uses the topic ${this.#topic}.`, "topic_in_use", "Let it use subscribe() of supabase-autotag, too.");
			return;
		}
		own.add(channel);
		this.#channel = channel;
		channel.on("broadcast", { event: "*" }, (message) => {
			if (turn === this.#turn) this.#receive(message);
		}).subscribe((status, error) => {
			if (turn !== this.#turn) return;
			if (status === "SUBSCRIBED") {
				this.#refused = null;
				this.liveSince = Date.now();
				this.#say("live");
				this.sync();
			} else if (status === "CHANNEL_ERROR" && /^"?Unauthorized\b/.test(error?.message ?? "")) this.#refuse(user, error.message);
			else this.#fail(error?.message ?? status);
		});
	}
	sync() {
		this.#tell((listener) => listener.onSync?.());
	}
	enqueued(assetIds, since) {
		this.#tell((listener) => listener.onEnqueued?.(assetIds, since));
	}
	changed(assetIds, jobId) {
		this.#tell((listener) => listener.onChange?.(assetIds, jobId));
	}
	#receive(message) {
		if (this.#hasAuth) return this.#deliver(message);
		const turn = this.#turn;
		this.#checked = this.#checked.then(() => this.#token()).then((token) => {
			if (turn !== this.#turn) return;
			if (userOf(token) === this.#user) this.#deliver(message);
			else this.connect();
		}).catch((error) => {
			if (turn === this.#turn) this.#failWith(error);
		});
	}
	#deliver({ event, payload }) {
		if (!payload || typeof payload !== "object") return;
		let message = payload;
		const ids = message.asset_ids;
		this.#listsIds ||= ids !== void 0;
		if (ids != null && !(Array.isArray(ids) && ids.every(isId))) message = {
			...message,
			asset_ids: null,
			many: true
		};
		const counts = event.startsWith("job-") && typeof message.job_id === "string" && this.#isNewest(event, message);
		this.#tell((listener) => {
			if (event === "job-progress" && counts) listener.onProgress?.(message);
			else if (event === "job-complete" && counts) listener.onJobComplete?.(message);
			else if (event === "batch-complete") listener.onBatchComplete?.(message);
		});
		if (message.asset_ids === void 0 && this.#listsIds && event === "batch-complete") return;
		if (message.asset_ids?.length !== 0) this.changed(message.asset_ids ?? null, message.job_id ?? null);
	}
	#isNewest(event, { job_id, completed, failed }) {
		const count = event === "job-complete" ? 1e400 : completed + failed;
		if (count < this.#counted.get(job_id)) return false;
		this.#counted.set(job_id, count);
		if (this.#counted.size > MAX_JOBS) this.#counted.delete(this.#counted.keys().next().value);
		return true;
	}
	#tell(say) {
		for (const listener of [...this.#listeners]) try {
			say(listener);
		} catch (error) {
			setTimeout(() => {
				throw error;
			});
		}
	}
	#say(status, error = null) {
		if (status === this.status && error?.message === this.error?.message) return;
		this.status = status;
		this.error = error;
		this.#tell((listener) => listener.onStatus?.(status, error));
	}
	async #token() {
		const realtime = this.#supabase.realtime;
		return await within(TOKEN_LIMIT, PROVIDER, async () => this.accessToken ? await this.accessToken() : await realtime.accessToken?.() ?? realtime.accessTokenValue);
	}
	async #authorize() {
		const realtime = this.#supabase.realtime;
		const { accessToken } = this;
		return await within(TOKEN_LIMIT, PROVIDER, async (signal) => {
			if (!accessToken) {
				await realtime.setAuth();
				return realtime.accessTokenValue;
			}
			const token = await accessToken();
			if (token && !signal.aborted) await realtime.setAuth(token);
			return token;
		});
	}
	#meet(user) {
		const former = this.#user;
		this.#user = user;
		if (former === void 0 || former === user) return;
		this.#refused = null;
		this.#failures = 0;
		this.#tell((listener) => listener.onUserChange?.());
		for (const forget of this.kept.values()) forget();
	}
	#leave() {
		this.#turn++;
		clearTimeout(this.#timer);
		this.#timer = void 0;
		this.liveSince = 1e400;
		const channel = this.#channel;
		this.#channel = null;
		this.#checked = Promise.resolve();
		if (channel) this.#left = Promise.resolve(this.#supabase.removeChannel(channel)).catch(() => void 0);
	}
	#fail(message, code = "channel", hint = "") {
		if (Date.now() - this.liveSince > STEADY) this.#failures = 0;
		this.#leave();
		if (this.#offline()) this.#say("offline");
		else this.#say("connecting", new AutotagError(code, message, hint));
		this.#again(this.#delay());
	}
	#failWith(error) {
		if (error instanceof AutotagError) this.#fail(error.message, error.code, error.hint);
		else this.#fail(String(error));
	}
	#delay() {
		return Math.min(FIRST_DELAY * 2 ** this.#failures++, LONGEST_DELAY) * (.75 + Math.random() / 2);
	}
	#refuse(user, message) {
		this.#leave();
		const known = this.#refused === user;
		this.#refused = user;
		if (known && this.status === "refused") return;
		this.#say("refused", new AutotagError("refused", message, "Only members of the workspace receive its messages."));
	}
	#again(delay) {
		clearTimeout(this.#timer);
		this.#timer = setTimeout(() => {
			this.connect();
		}, delay);
	}
	#stop() {
		this.#leave();
		this.#stopWatching?.();
		this.#stopWatching = null;
		if (!this.#hasAuth) {
			this.#user = void 0;
			for (const forget of this.kept.values()) forget();
		}
		this.#refused = null;
		this.#failures = 0;
		this.status = "connecting";
		this.error = null;
	}
	#offline() {
		return globalThis.navigator?.onLine === false;
	}
	#watch() {
		const now = () => {
			this.#failures = 0;
			if (this.status !== "refused") this.connect();
		};
		const seen = () => {
			if (document.visibilityState === "hidden") {
				this.#hiddenAt = Date.now();
				return;
			}
			const long = this.#hiddenAt && Date.now() - this.#hiddenAt > LONG_HIDDEN;
			this.#hiddenAt = 0;
			if (this.status !== "live") now();
			else if (long) this.sync();
		};
		const lost = () => {
			this.#leave();
			this.#say("offline");
		};
		const page = typeof document === "undefined" ? null : document;
		const view = typeof window === "undefined" || !window.addEventListener ? null : window;
		page?.addEventListener?.("visibilitychange", seen);
		view?.addEventListener("online", now);
		view?.addEventListener("offline", lost);
		return () => {
			page?.removeEventListener?.("visibilitychange", seen);
			view?.removeEventListener("online", now);
			view?.removeEventListener("offline", lost);
		};
	}
	#watchAuth() {
		if (this.#hasAuth || this.accessToken) return;
		try {
			this.#supabase.auth.onAuthStateChange((event, session) => {
				if (event === "INITIAL_SESSION") return;
				const user = session?.user.id ?? null;
				const changed = user !== this.#user;
				if (changed) {
					this.#leave();
					this.#meet(user);
					this.#say(user ? "connecting" : "signed-out");
				}
				const renewed = event === "TOKEN_REFRESHED" || event === "MFA_CHALLENGE_VERIFIED";
				const waits = this.#timer !== void 0 || this.status === "refused" && renewed;
				if (user && (changed || waits)) this.#again(0);
			});
			this.#hasAuth = true;
		} catch {}
	}
};
// dist/changes.js
function oneAtATime(fetch, limit = REQUEST_LIMIT) {
	let changed;
	let running = null;
	function add(assetIds) {
		changed = assetIds && changed !== null ? new Set([...changed ?? [], ...assetIds]) : null;
	}
	async function run() {
		try {
			while (changed !== void 0) {
				const now = changed;
				changed = void 0;
				await within(limit, "The fetch", (signal) => fetch(now && [...now], signal)).catch((error) => {
					const goesOn = changed !== void 0 && error instanceof AutotagError && error.code === "timeout";
					add(now);
					if (!goesOn) throw error;
				});
			}
		} finally {
			running = null;
		}
	}
	return (assetIds) => {
		add(assetIds);
		return running ??= run();
	};
}
// dist/stage.js
const ENGLISH = {
	none: "Not tagged",
	queued: "Queued for tagging",
	preparing: "Preparing images…",
	submitted: "Submitted to AI",
	processing: (left) => left ? `AI analyzing (${left})` : "AI analyzing",
	completing: "Saving tags…",
	completed: "Tagged",
	failed: "Not tagged",
	other: "Being tagged…",
	minutes: (minutes) => `~${minutes} min`,
	hours: (hours) => `~${hours} h`,
	soon: "any moment now"
};
function describeEta(eta, options = {}) {
	const at = eta ? Date.parse(eta) : NaN;
	if (Number.isNaN(at)) return null;
	const texts = {
		...ENGLISH,
		...options.texts
	};
	const minutes = Math.ceil((at - Number(options.now ?? Date.now())) / 6e4);
	if (minutes <= 0) return texts.soon;
	return minutes < 90 ? texts.minutes(minutes) : texts.hours(Math.round(minutes / 60));
}
function describeStage(row, options = {}) {
	const texts = {
		...ENGLISH,
		...options.texts
	};
	const stage = row.tagging_stage ?? null;
	const live = stage !== null && stage !== "completed" && stage !== "failed";
	const eta = live ? describeEta(row.tagging_eta, options) : null;
	const text = stage === null ? texts.none : stage === "processing" ? texts.processing(eta ?? "") : texts[stage] ?? texts.other;
	const part = Math.min(Math.max((row.tagging_progress ?? 0) / 100, 0), 1);
	return {
		stage,
		text,
		progress: stage === "completed" ? 1 : !live ? null : stage === "completing" ? Math.max(part, .9) : part,
		eta,
		live,
		error: row.tagging_error ?? null
	};
}
// dist/index.js
const lives = new WeakMap();
function liveOf(supabase, workspaceId, accessToken) {
	const own = lives.get(supabase) ?? new Map();
	lives.set(supabase, own);
	const key = String(workspaceId);
	const live = own.get(key) ?? new Live(supabase, workspaceId, accessToken);
	own.set(key, live);
	if (accessToken) live.accessToken = accessToken;
	return live;
}
function createAutotag(supabase, options) {
	const { workspaceId, accessToken } = options;
	const live = liveOf(supabase, workspaceId, accessToken);
	async function call(name, args) {
		return await result(supabase.rpc(name, args));
	}
	async function read(name, args) {
		return await result(answerTo(supabase.rpc(name, args)));
	}
	async function result(answer) {
		const { data, error, status } = await answer;
		if (error) throw fromRest(error, status);
		return data;
	}
	async function jobs({ onlyLive = false, before, limit = 50 } = {}) {
		const until = before instanceof Date ? before.toISOString() : before;
		return await read("tagging_jobs", {
			workspace_id: workspaceId,
			only_live: onlyLive,
			limit,
			...until && { before: until }
		});
	}
	return {
		workspaceId,
		get status() {
			return live.status;
		},
		async enqueue(assetIds) {
			const since = Date.now();
			const made = await call("enqueue_tagging", { asset_ids: assetIds });
			if (made.image_count && !made.skipped) live.enqueued(assetIds, since);
			else live.changed([...assetIds], made.job_id);
			return made;
		},
		async cancel(jobId) {
			const done = await call("cancel_tagging", { job_id: jobId });
			if (live.status !== "live") live.changed(null, jobId);
			return done;
		},
		async retry(jobId) {
			const made = await call("retry_tagging", { job_id: jobId });
			if (made.image_count) live.changed(null, made.job_id);
			return made;
		},
		jobs,
		job: (jobId) => read("tagging_job", { job_id: jobId }),
		strategy: (imageCount) => read("tagging_strategy", { image_count: imageCount }),
		usage: (period = {}) => read("tagging_usage", {
			workspace_id: workspaceId,
			...period
		}),
		peekRateLimit: (requestType, imageCount) => read("peek_rate_limit", {
			workspace_id: workspaceId,
			request_type: requestType,
			image_count: imageCount
		}),
		subscribe: (listener) => live.listen(listener),
		reconnect: () => live.connect()
	};
}
export { AutotagError, ENGLISH, liveOf as _liveOf, createAutotag, describeEta, describeStage, oneAtATime };
