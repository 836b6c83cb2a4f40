import type { Stage } from './types.js'

/** The columns of a row that show its tagging state. */
export interface StageColumns {
  tagging_stage?: string | null
  tagging_progress?: number | null
  tagging_eta?: string | null
  tagging_error?: string | null
}

/** Every text of `describeStage`, for translations. */
export interface StageTexts {
  none: string
  queued: string
  preparing: string
  submitted: string
  /** `left` is one of the texts below, or empty. */
  processing(left: string): string
  completing: string
  completed: string
  failed: string
  /** A stage that this version does not know. */
  other: string
  minutes(minutes: number): string
  hours(hours: number): string
  /** The predicted time has passed. */
  soon: string
}

export const ENGLISH: StageTexts = {
  none: 'Not tagged',
  queued: 'Queued for tagging',
  preparing: 'Preparing images…',
  submitted: 'Submitted to AI',
  processing: (left) => left ? `AI analyzing (${left})` : 'AI analyzing',
  completing: 'Saving tags…',
  completed: 'Tagged',
  failed: 'Not tagged',
  other: 'Being tagged…',
  minutes: (minutes) => `~${minutes} min`,
  hours: (hours) => `~${hours} h`,
  soon: 'any moment now',
}

export interface DescribeOptions {
  /** Texts in another language. Missing texts are English. */
  texts?: Partial<StageTexts>
  /** The current time. Default: Date.now(). */
  now?: number | Date
}

export interface StageDescription {
  stage: Stage | null
  text: string
  /** 0 to 1 while the image is being tagged, 1 when it is tagged; null: show no bar. */
  progress: number | null
  /** The time left as text; null if there is none to show. */
  eta: string | null
  /** The image is being tagged. */
  live: boolean
  /** The sentence for the user; it may be set although the image is `completed`. */
  error: string | null
}

/** The time until `eta`, as text. It is never negative. */
export function describeEta(eta: string | null | undefined, options: DescribeOptions = {}): string | null {
  const at = eta ? Date.parse(eta) : NaN
  if (Number.isNaN(at)) return null
  const texts = { ...ENGLISH, ...options.texts }
  const minutes = Math.ceil((at - Number(options.now ?? Date.now())) / 60_000)
  if (minutes <= 0) return texts.soon
  return minutes < 90 ? texts.minutes(minutes) : texts.hours(Math.round(minutes / 60))
}

/** What to show for a row: text, progress and time left, for every stage and for rows without a stage. */
export function describeStage(row: StageColumns, options: DescribeOptions = {}): StageDescription {
  const texts = { ...ENGLISH, ...options.texts }
  const stage = (row.tagging_stage ?? null) as Stage | null
  const live = stage !== null && stage !== 'completed' && stage !== 'failed'
  const eta = live ? describeEta(row.tagging_eta, options) : null
  const text = stage === null ? texts.none : stage === 'processing' ? texts.processing(eta ?? '') : texts[stage] ?? texts.other
  const part = Math.min(Math.max((row.tagging_progress ?? 0) / 100, 0), 1)
  const progress = stage === 'completed' ? 1 : !live ? null : stage === 'completing' ? Math.max(part, 0.9) : part
  return { stage, text, progress, eta, live, error: row.tagging_error ?? null }
}
