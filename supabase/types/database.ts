
export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  
  "public": {
          Tables: {
            "assets": {
                  Row: {
                    "created_at": string,"id": string,"image_url": string | null,"storage_bucket": string | null,"storage_path": string | null,"tagging_error": string | null,"tagging_eta": string | null,"tagging_progress": number | null,"tagging_result": Json | null,"tagging_stage": string | null,"tags": (string)[] | null,"workspace_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"image_url"?: string | null,"storage_bucket"?: string | null,"storage_path"?: string | null,"tagging_error"?: string | null,"tagging_eta"?: string | null,"tagging_progress"?: number | null,"tagging_result"?: Json | null,"tagging_stage"?: string | null,"tags"?: (string)[] | null,"workspace_id": string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"image_url"?: string | null,"storage_bucket"?: string | null,"storage_path"?: string | null,"tagging_error"?: string | null,"tagging_eta"?: string | null,"tagging_progress"?: number | null,"tagging_result"?: Json | null,"tagging_stage"?: string | null,"tags"?: (string)[] | null,"workspace_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "assets_workspace_id_fkey"
      columns: ["workspace_id"]
isOneToOne: false
      referencedRelation: "workspaces"
      referencedColumns: ["id"]
    }
                  ]
                },"workspace_members": {
                  Row: {
                    "user_id": string,"workspace_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "user_id": string,"workspace_id": string
                  }
                  Update: {
                    "user_id"?: string,"workspace_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "workspace_members_workspace_id_fkey"
      columns: ["workspace_id"]
isOneToOne: false
      referencedRelation: "workspaces"
      referencedColumns: ["id"]
    }
                  ]
                },"workspaces": {
                  Row: {
                    "created_at": string,"id": string,"name": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"name": string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"name"?: string
                  }
                  Relationships: [
                    
                  ]
                }
          }
          Views: {
            "tagging_batch_result": {
                  Row: {
                    "batch_id": string | null,"image_count": number,"state": string
                  }
                  ComputedFields: never
                  Insert: {
                           "batch_id"?: string | null,"image_count"?: number | null,"state"?: string | null
                         }
                        Update: {
                           "batch_id"?: string | null,"image_count"?: number | null,"state"?: string | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_cancel_result": {
                  Row: {
                    "cancelled": number,"job_id": string
                  }
                  ComputedFields: never
                  Insert: {
                           "cancelled"?: number | null,"job_id"?: string | null
                         }
                        Update: {
                           "cancelled"?: number | null,"job_id"?: string | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_job_result": {
                  Row: {
                    "batches": (Database["public"]['Views']["tagging_batch_result"]['Row'])[],"cancelled": boolean,"completed": number,"created_at": string,"error": string | null,"eta": string | null,"eta_p90": string | null,"failed": number,"fallback": string | null,"finished_at": string | null,"image_count": number,"job_id": string,"progress": number,"stages": Database["public"]['Views']["tagging_stage_counts"]['Row'],"status": Database["public"]['Enums']["tagging_job_status"],"strategy": Database["public"]['Enums']["tagging_strategy_name"]
                  }
                  ComputedFields: never
                  Insert: {
                           "batches"?: (Database["public"]['Views']["tagging_batch_result"]['Row'])[] | null,"cancelled"?: boolean | null,"completed"?: number | null,"created_at"?: string | null,"error"?: string | null,"eta"?: string | null,"eta_p90"?: string | null,"failed"?: number | null,"fallback"?: string | null,"finished_at"?: string | null,"image_count"?: number | null,"job_id"?: string | null,"progress"?: number | null,"stages"?: Database["public"]['Views']["tagging_stage_counts"]['Row'] | null,"status"?: Database["public"]['Enums']["tagging_job_status"] | null,"strategy"?: Database["public"]['Enums']["tagging_strategy_name"] | null
                         }
                        Update: {
                           "batches"?: (Database["public"]['Views']["tagging_batch_result"]['Row'])[] | null,"cancelled"?: boolean | null,"completed"?: number | null,"created_at"?: string | null,"error"?: string | null,"eta"?: string | null,"eta_p90"?: string | null,"failed"?: number | null,"fallback"?: string | null,"finished_at"?: string | null,"image_count"?: number | null,"job_id"?: string | null,"progress"?: number | null,"stages"?: Database["public"]['Views']["tagging_stage_counts"]['Row'] | null,"status"?: Database["public"]['Enums']["tagging_job_status"] | null,"strategy"?: Database["public"]['Enums']["tagging_strategy_name"] | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_limit_result": {
                  Row: {
                    "allowed": boolean,"reason": string | null,"retry_after": number | null
                  }
                  ComputedFields: never
                  Insert: {
                           "allowed"?: boolean | null,"reason"?: string | null,"retry_after"?: number | null
                         }
                        Update: {
                           "allowed"?: boolean | null,"reason"?: string | null,"retry_after"?: number | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_profile_result": {
                  Row: {
                    "add_parents": boolean,"created_at": string | null,"fields": NonNullable<Json>,"instructions": string,"language": string | null,"min_confidence": number,"own": boolean,"tag_count": number | null,"version": number,"vocabulary_mode": string
                  }
                  ComputedFields: never
                  Insert: {
                           "add_parents"?: boolean | null,"created_at"?: string | null,"fields"?: Json | null,"instructions"?: string | null,"language"?: string | null,"min_confidence"?: number | null,"own"?: boolean | null,"tag_count"?: number | null,"version"?: number | null,"vocabulary_mode"?: string | null
                         }
                        Update: {
                           "add_parents"?: boolean | null,"created_at"?: string | null,"fields"?: Json | null,"instructions"?: string | null,"language"?: string | null,"min_confidence"?: number | null,"own"?: boolean | null,"tag_count"?: number | null,"version"?: number | null,"vocabulary_mode"?: string | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_stage_counts": {
                  Row: {
                    "completed": number,"completing": number,"failed": number,"preparing": number,"processing": number,"queued": number,"submitted": number
                  }
                  ComputedFields: never
                  Insert: {
                           "completed"?: number | null,"completing"?: number | null,"failed"?: number | null,"preparing"?: number | null,"processing"?: number | null,"queued"?: number | null,"submitted"?: number | null
                         }
                        Update: {
                           "completed"?: number | null,"completing"?: number | null,"failed"?: number | null,"preparing"?: number | null,"processing"?: number | null,"queued"?: number | null,"submitted"?: number | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_strategy_result": {
                  Row: {
                    "batches": number,"chunks": number,"delay_ms": number,"estimate_seconds": number | null,"note": string | null,"type": Database["public"]['Enums']["tagging_strategy_name"]
                  }
                  ComputedFields: never
                  Insert: {
                           "batches"?: number | null,"chunks"?: number | null,"delay_ms"?: number | null,"estimate_seconds"?: number | null,"note"?: string | null,"type"?: Database["public"]['Enums']["tagging_strategy_name"] | null
                         }
                        Update: {
                           "batches"?: number | null,"chunks"?: number | null,"delay_ms"?: number | null,"estimate_seconds"?: number | null,"note"?: string | null,"type"?: Database["public"]['Enums']["tagging_strategy_name"] | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_upload_result": {
                  Row: {
                    "batches": number,"eta": string | null,"image_count": number,"job_id": string | null,"skipped": number,"strategy": Database["public"]['Enums']["tagging_strategy_name"] | null
                  }
                  ComputedFields: never
                  Insert: {
                           "batches"?: number | null,"eta"?: string | null,"image_count"?: number | null,"job_id"?: string | null,"skipped"?: number | null,"strategy"?: Database["public"]['Enums']["tagging_strategy_name"] | null
                         }
                        Update: {
                           "batches"?: number | null,"eta"?: string | null,"image_count"?: number | null,"job_id"?: string | null,"skipped"?: number | null,"strategy"?: Database["public"]['Enums']["tagging_strategy_name"] | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_usage_result": {
                  Row: {
                    "cache_write_tokens": number,"cached_tokens": number,"cost": number | null,"day": string,"images": number,"input_tokens": number,"model": string,"output_tokens": number,"reasoning_tokens": number,"requests": number,"service_tier": string,"user_id": string | null
                  }
                  ComputedFields: never
                  Insert: {
                           "cache_write_tokens"?: number | null,"cached_tokens"?: number | null,"cost"?: number | null,"day"?: string | null,"images"?: number | null,"input_tokens"?: number | null,"model"?: string | null,"output_tokens"?: number | null,"reasoning_tokens"?: number | null,"requests"?: number | null,"service_tier"?: string | null,"user_id"?: string | null
                         }
                        Update: {
                           "cache_write_tokens"?: number | null,"cached_tokens"?: number | null,"cost"?: number | null,"day"?: string | null,"images"?: number | null,"input_tokens"?: number | null,"model"?: string | null,"output_tokens"?: number | null,"reasoning_tokens"?: number | null,"requests"?: number | null,"service_tier"?: string | null,"user_id"?: string | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_vocabulary_change": {
                  Row: {
                    "added": number,"changed": number,"removed": number,"tags": number
                  }
                  ComputedFields: never
                  Insert: {
                           "added"?: number | null,"changed"?: number | null,"removed"?: number | null,"tags"?: number | null
                         }
                        Update: {
                           "added"?: number | null,"changed"?: number | null,"removed"?: number | null,"tags"?: number | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_vocabulary_result": {
                  Row: {
                    "add_parents": boolean,"may_edit": boolean,"mode": string,"tags": (Database["public"]['Views']["tagging_vocabulary_tag"]['Row'])[]
                  }
                  ComputedFields: never
                  Insert: {
                           "add_parents"?: boolean | null,"may_edit"?: boolean | null,"mode"?: string | null,"tags"?: (Database["public"]['Views']["tagging_vocabulary_tag"]['Row'])[] | null
                         }
                        Update: {
                           "add_parents"?: boolean | null,"may_edit"?: boolean | null,"mode"?: string | null,"tags"?: (Database["public"]['Views']["tagging_vocabulary_tag"]['Row'])[] | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_vocabulary_tag": {
                  Row: {
                    "aliases": (string)[],"description": string | null,"general": boolean,"parent": string | null,"tag": string
                  }
                  ComputedFields: never
                  Insert: {
                           "aliases"?: (string)[] | null,"description"?: string | null,"general"?: boolean | null,"parent"?: string | null,"tag"?: string | null
                         }
                        Update: {
                           "aliases"?: (string)[] | null,"description"?: string | null,"general"?: boolean | null,"parent"?: string | null,"tag"?: string | null
                         }
                        Relationships: [
                    
                  ]
                },"tagging_webhook_result": {
                  Row: {
                    "result": string
                  }
                  ComputedFields: never
                  Insert: {
                           "result"?: string | null
                         }
                        Update: {
                           "result"?: string | null
                         }
                        Relationships: [
                    
                  ]
                },"workspace_rate_limits": {
                  Row: {
                    "admitted_at": (string)[],"max_requests": number | null,"max_units": number | null,"request_type": string,"requests": (number)[],"units": (number)[],"workspace_id": string
                  }
                  ComputedFields: never
                  Insert: {
                           "admitted_at"?: (string)[] | null,"max_requests"?: number | null,"max_units"?: number | null,"request_type"?: string | null,"requests"?: (number)[] | null,"units"?: (number)[] | null,"workspace_id"?: string | null
                         }
                        Update: {
                           "admitted_at"?: (string)[] | null,"max_requests"?: number | null,"max_units"?: number | null,"request_type"?: string | null,"requests"?: (number)[] | null,"units"?: (number)[] | null,"workspace_id"?: string | null
                         }
                        Relationships: [
                    
                  ]
                }
          }
          Functions: {
            "cancel_tagging":
{ Args: { "job_id": string }; Returns: {
              "cancelled": number,
"job_id": string
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_cancel_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"check_rate_limit":
{ Args: { "image_count": number,"request_type": Database["public"]['Enums']["tagging_request_type"],"workspace_id": string }; Returns: {
              "allowed": boolean,
"reason": string | null,
"retry_after": number | null
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_limit_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"edit_tagging_vocabulary":
{ Args: { "entries"?: Json,"removed"?: (string)[],"workspace_id": string }; Returns: {
              "added": number,
"changed": number,
"removed": number,
"tags": number
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_vocabulary_change"
        isOneToOne: true
        isSetofReturn: false
      } },
"enqueue_tagging":
{ Args: { "asset_ids": (string)[] }; Returns: {
              "batches": number,
"eta": string | null,
"image_count": number,
"job_id": string | null,
"skipped": number,
"strategy": Database["public"]['Enums']["tagging_strategy_name"] | null
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_upload_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"openai_webhook":
{ Args: { "batch_id": string,"event_type": string,"webhook_id": string }; Returns: {
              "result": string
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_webhook_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"peek_rate_limit":
{ Args: { "image_count": number,"request_type": Database["public"]['Enums']["tagging_request_type"],"workspace_id": string }; Returns: {
              "allowed": boolean,
"reason": string | null,
"retry_after": number | null
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_limit_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"retry_tagging":
{ Args: { "job_id": string }; Returns: {
              "batches": number,
"eta": string | null,
"image_count": number,
"job_id": string | null,
"skipped": number,
"strategy": Database["public"]['Enums']["tagging_strategy_name"] | null
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_upload_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"set_tagging_profile":
{ Args: { "profile": Json,"workspace_id": string }; Returns: {
              "add_parents": boolean,
"created_at": string | null,
"fields": NonNullable<Json>,
"instructions": string,
"language": string | null,
"min_confidence": number,
"own": boolean,
"tag_count": number | null,
"version": number,
"vocabulary_mode": string
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_profile_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"set_tagging_vocabulary":
{ Args: { "entries": Json,"workspace_id": string }; Returns: {
              "added": number,
"changed": number,
"removed": number,
"tags": number
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_vocabulary_change"
        isOneToOne: true
        isSetofReturn: false
      } },
"tagging_job":
{ Args: { "job_id": string }; Returns: {
              "batches": (Database["public"]['Views']["tagging_batch_result"]['Row'])[],
"cancelled": boolean,
"completed": number,
"created_at": string,
"error": string | null,
"eta": string | null,
"eta_p90": string | null,
"failed": number,
"fallback": string | null,
"finished_at": string | null,
"image_count": number,
"job_id": string,
"progress": number,
"stages": Database["public"]['Views']["tagging_stage_counts"]['Row'],
"status": Database["public"]['Enums']["tagging_job_status"],
"strategy": Database["public"]['Enums']["tagging_strategy_name"]
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_job_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"tagging_jobs":
{ Args: { "before"?: string,"limit"?: number,"only_live"?: boolean,"workspace_id": string }; Returns: {
              "batches": (Database["public"]['Views']["tagging_batch_result"]['Row'])[],
"cancelled": boolean,
"completed": number,
"created_at": string,
"error": string | null,
"eta": string | null,
"eta_p90": string | null,
"failed": number,
"fallback": string | null,
"finished_at": string | null,
"image_count": number,
"job_id": string,
"progress": number,
"stages": Database["public"]['Views']["tagging_stage_counts"]['Row'],
"status": Database["public"]['Enums']["tagging_job_status"],
"strategy": Database["public"]['Enums']["tagging_strategy_name"]
            }[]
                          SetofOptions: {
        from: "*"
        to: "tagging_job_result"
        isOneToOne: false
        isSetofReturn: true
      } },
"tagging_profile":
{ Args: { "workspace_id": string }; Returns: {
              "add_parents": boolean,
"created_at": string | null,
"fields": NonNullable<Json>,
"instructions": string,
"language": string | null,
"min_confidence": number,
"own": boolean,
"tag_count": number | null,
"version": number,
"vocabulary_mode": string
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_profile_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"tagging_strategy":
{ Args: { "image_count": number }; Returns: {
              "batches": number,
"chunks": number,
"delay_ms": number,
"estimate_seconds": number | null,
"note": string | null,
"type": Database["public"]['Enums']["tagging_strategy_name"]
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_strategy_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"tagging_usage":
{ Args: { "since"?: string,"until"?: string,"workspace_id": string }; Returns: {
              "cache_write_tokens": number,
"cached_tokens": number,
"cost": number | null,
"day": string,
"images": number,
"input_tokens": number,
"model": string,
"output_tokens": number,
"reasoning_tokens": number,
"requests": number,
"service_tier": string,
"user_id": string | null
            }[]
                          SetofOptions: {
        from: "*"
        to: "tagging_usage_result"
        isOneToOne: false
        isSetofReturn: true
      } },
"tagging_vocabulary":
{ Args: { "workspace_id": string }; Returns: {
              "add_parents": boolean,
"may_edit": boolean,
"mode": string,
"tags": (Database["public"]['Views']["tagging_vocabulary_tag"]['Row'])[]
            }
                          SetofOptions: {
        from: "*"
        to: "tagging_vocabulary_result"
        isOneToOne: true
        isSetofReturn: false
      } }
          }
          Enums: {
            "tagging_job_status": "running"|"cancelling"|"completed"|"cancelled","tagging_request_type": "realtime"|"batch","tagging_stage": "queued"|"preparing"|"submitted"|"processing"|"completing"|"completed"|"failed","tagging_strategy_name": "realtime"|"realtime-chunked"|"batch"|"batch-parallel"
          }
          CompositeTypes: {
            [_ in never]: never
          }
        }
}

type DatabaseWithoutInternals = Omit<Database, '__InternalSupabase'>

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, "public">]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    | keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
  ? (DefaultSchema["Tables"] & DefaultSchema["Views"])[DefaultSchemaTableNameOrOptions] extends {
      Row: infer R
    }
    ? R
    : never
  : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Insert: infer I
    }
    ? I
    : never
  : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Update: infer U
    }
    ? U
    : never
  : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends
    | keyof DefaultSchema["Enums"]
    | { schema: keyof DatabaseWithoutInternals },
  EnumName extends DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"]
    : never = never
> = DefaultSchemaEnumNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema["Enums"]
  ? DefaultSchema["Enums"][DefaultSchemaEnumNameOrOptions]
  : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    | keyof DefaultSchema["CompositeTypes"]
    | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"]
    : never = never
> = PublicCompositeTypeNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema["CompositeTypes"]
  ? DefaultSchema["CompositeTypes"][PublicCompositeTypeNameOrOptions]
  : never

export const Constants = {
  "public": {
          Enums: {
            "tagging_job_status": ["running", "cancelling", "completed", "cancelled"],"tagging_request_type": ["realtime", "batch"],"tagging_stage": ["queued", "preparing", "submitted", "processing", "completing", "completed", "failed"],"tagging_strategy_name": ["realtime", "realtime-chunked", "batch", "batch-parallel"]
          }
        }
} as const
